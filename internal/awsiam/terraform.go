package awsiam

import (
	"fmt"
	"strconv"
	"strings"
)

// Terraform is the stack for Terraform and OpenTofu, in HCL.
func (s Stack) Terraform() string {
	var b strings.Builder
	line := func(format string, a ...any) { fmt.Fprintf(&b, format+"\n", a...) }
	line("# perimeterd: the %s account's part of a bastion's egress", s.Name)
	line("terraform {\n  required_providers {\n    aws = {\n      source = \"hashicorp/aws\"\n    }\n  }\n}")
	if len(s.group) > 0 {
		line("\nresource \"aws_iam_group\" \"users\" {\n  name = \"perimeter-users\"\n}")
		line("\nresource \"aws_iam_user\" \"user\" {\n  for_each = toset([%s])\n  name     = each.key\n}", quoted(s.users))
		line("\nresource \"aws_iam_user_group_membership\" \"user\" {\n  for_each = aws_iam_user.user\n  user     = each.value.name\n  groups   = [aws_iam_group.users.name]\n}")
		for _, p := range s.group {
			line("\nresource \"aws_iam_group_policy\" %q {\n  name   = %q\n  group  = aws_iam_group.users.name\n  policy = %s\n}", p.name, p.name, heredoc(p.Document))
		}
	}
	if len(s.keepers) > 0 {
		line("\nresource \"aws_iam_user_policy\" \"break_glass\" {\n  for_each = toset([%s])\n  name     = %q\n  user     = each.key\n  policy   = %s\n}", quoted(s.keepers), s.keeper.name, heredoc(s.keeper.Document))
	}
	for _, r := range s.roles {
		id := map[string]string{"Role": "role", "BreakGlass": "break_glass"}[r.id]
		line("\nresource \"aws_iam_role\" %q {\n  name               = %s\n  description        = %q\n  assume_role_policy = %s\n}", id, quote(r.name), r.about, heredoc(r.trust))
		first := ""
		if r.guard != nil {
			line("\nresource \"aws_iam_role_policy\" %q {\n  name   = %q\n  role   = aws_iam_role.%s.name\n  policy = %s\n}", id, r.guard.name, id, heredoc(r.guard.Document))
			first = "\n  depends_on = [aws_iam_role_policy." + id + "] # never a moment without its guard"
		}
		line("\nresource \"aws_iam_role_policy_attachment\" %q {\n  role       = aws_iam_role.%s.name\n  policy_arn = %s%s\n}", id, id, quote(r.policy), first)
		line("\noutput \"%s_arn\" {\n  value = aws_iam_role.%s.arn\n}", id, id)
	}
	return b.String()
}

// escape keeps HCL from taking IAM's variables for its own.
var escape = strings.NewReplacer("${", "$${", "%{", "%%{")

func heredoc(d Document) string {
	return "<<-JSON\n" + escape.Replace("    "+d.text("    ", "  ")) + "  JSON"
}

func quote(s string) string { return escape.Replace(strconv.Quote(s)) }

func quoted(names []string) string {
	var all []string
	for _, n := range names {
		all = append(all, quote(n))
	}
	return strings.Join(all, ", ")
}
