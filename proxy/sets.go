package proxy

// sets are the named sets. {r} stands for each configured region, and a * inside a name for anything within one label.
func sets() map[string][]string {
	return map[string][]string{
		// From AWS's own allow-list for sign-in, Identity Center's portal list, and the console's DNS pages.
		"aws": {
			// Sign-in.
			"signin.aws.amazon.com", "{r}.signin.aws.amazon.com", "{r}.signin.aws", "signin.{r}.api.aws",
			"*.cloudfront.net", "opfcaptcha-prod.s3.amazonaws.com",
			// Identity Center's portal. *.awsapps.com stands for the alias, which only its owner knows.
			"*.awsapps.com", "*.aws.dev", "*.awsstatic.com", "*.console.aws.a2z.com", "oidc.{r}.amazonaws.com",
			"*.sso.amazonaws.com", "*.sso.{r}.amazonaws.com", "*.sso-portal.{r}.amazonaws.com", "*.portal.{r}.app.aws",
			"oidc.{r}.api.aws", "sso.{r}.api.aws", "portal.sso.{r}.api.aws", "{r}.sso.signin.aws",
			// Console.
			"console.aws.amazon.com", "*.console.aws.amazon.com", "*.console.api.aws",
			"health.aws.amazon.com", "status.aws.amazon.com", "docs.aws.amazon.com",
			// APIs.
			"*.amazonaws.com", "*.api.aws",
		},
		// Names under amazonaws.com where any AWS customer can put content: load balancers, instances, API Gateway,
		// bucket web sites, databases, search domains, and PrivateLink services. Buckets are not here: the S3 API has
		// the same names.
		"customer-hosted": {
			"*.elb.amazonaws.com", "*.elb.*.amazonaws.com",
			"*.compute.amazonaws.com", "*.compute-1.amazonaws.com",
			"*.execute-api.*.amazonaws.com", "*.execute-api.amazonaws.com", "*.execute-api.*.api.aws",
			"*.s3-website*.amazonaws.com", "*.s3-website.*.amazonaws.com",
			"*.rds.amazonaws.com",
			"*.es.amazonaws.com", "*.aoss.amazonaws.com", "*.vpce.amazonaws.com",
		},
		// What `terraform init` and HCP Terraform reach; providers of others are downloaded from GitHub.
		"terraform": {
			"registry.terraform.io", "releases.hashicorp.com", "checkpoint-api.hashicorp.com",
			"app.terraform.io", "archivist.terraform.io",
		},
		"github": {
			"github.com", "api.github.com", "codeload.github.com", "gist.github.com", "uploads.github.com",
			"*.githubusercontent.com", "github.githubassets.com",
		},
	}
}
