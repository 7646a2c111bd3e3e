package awsiam

// What of a service runs inside a VPC, is reached over a network interface there, and so carries neither aws:SourceIp nor
// aws:SourceVpc as AWS's endpoints do: github.com/aws-samples/data-perimeter-policy-examples, service_control_policies.
var insideVPC = Values{
	"dax:BatchGetItem", "dax:BatchWriteItem", "dax:ConditionCheckItem", "dax:DeleteItem", "dax:GetItem", "dax:PutItem", "dax:Query", "dax:Scan", "dax:UpdateItem",
	"elasticfilesystem:Client*", "es:ES*", "kafka-cluster:*", "neptune-db:*", "rds-db:connect", "s3-outposts:*",
}

func (o Options) addresses() Values {
	v := Values{}
	for _, p := range o.Egress {
		v = append(v, p.String())
	}
	return v
}

// elsewhere holds for a request that comes neither from the egress nor through one of the VPCs' endpoints, that AWS does not
// make on somebody's behalf, and whose maker is not spared. Where a key is absent it holds.
func (o Options) elsewhere() Condition {
	c := Condition{
		"NotIpAddressIfExists": {"aws:SourceIp": o.addresses()},
		"BoolIfExists":         {"aws:ViaAWSService": {"false"}},
	}
	if len(o.VPCs) > 0 {
		c["StringNotEqualsIfExists"] = map[string]Values{"aws:SourceVpc": o.VPCs}
	}
	if len(o.BreakGlass) > 0 {
		c["ArnNotLike"] = map[string]Values{"aws:PrincipalArn": o.BreakGlass}
	}
	return c
}

func (o Options) from() Condition { return Condition{"IpAddress": {"aws:SourceIp": o.addresses()}} }

func roleGuard(o Options) ([]Statement, error) {
	return []Statement{{Sid: "DenyElsewhere", Effect: "Deny", NotAction: insideVPC, Resource: Values{"*"}, Condition: o.elsewhere()}}, nil
}

func userGuard(o Options) ([]Statement, error) {
	return []Statement{{Sid: "DenyElsewhere", Effect: "Deny", Action: Values{"*"}, Resource: Values{"*"}, Condition: o.elsewhere()}}, nil
}

// scpGuard binds people only: services' own roles call from addresses of AWS.
func scpGuard(o Options) ([]Statement, error) {
	people := Values{"arn:*:iam::*:user/*", "arn:*:iam::*:" + identityCenter + "*"}
	for _, s := range o.Roles {
		if err := checkPrincipal("--role", s, true, "role"); err != nil {
			return nil, err
		}
		people = append(people, s)
	}
	c := o.elsewhere()
	c["ArnLike"] = map[string]Values{"aws:PrincipalArn": people}
	return []Statement{{Sid: "DenyPeopleElsewhere", Effect: "Deny", NotAction: insideVPC, Resource: Values{"*"}, Condition: c}}, nil
}

func noUsers(o Options) ([]Statement, error) {
	s := Statement{Sid: "DenyUserCredentials", Effect: "Deny", Resource: Values{"*"}, Action: Values{
		"iam:CreateAccessKey", "iam:CreateLoginProfile", "iam:CreateServiceSpecificCredential", "iam:CreateUser", "iam:ResetServiceSpecificCredential",
		"iam:UpdateAccessKey", "iam:UpdateLoginProfile", "iam:UploadSSHPublicKey", "iam:UploadSigningCertificate",
	}}
	if len(o.BreakGlass) > 0 {
		s.Condition = Condition{"ArnNotLike": {"aws:PrincipalArn": o.BreakGlass}}
	}
	return []Statement{s}, nil
}

// sessionPin denies onward sessions too: they would have the next role's rights, and no pin. GetSessionToken is not for roles'
// sessions, but a user's session can be pinned as well: one pattern is it and GetFederationToken, which servers with an STS of
// their own refuse to be told of by name.
func sessionPin(o Options) ([]Statement, error) {
	return []Statement{
		{Effect: "Allow", Action: Values{"*"}, Resource: Values{"*"}},
		{Sid: "DenyElsewhere", Effect: "Deny", Action: Values{"*"}, Resource: Values{"*"}, Condition: o.elsewhere()},
		{Sid: "DenyOnward", Effect: "Deny", Action: Values{"sts:AssumeRole*", "sts:Get*ionToken"}, Resource: Values{"*"}},
	}, nil
}
