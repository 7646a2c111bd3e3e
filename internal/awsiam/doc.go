// Package awsiam is AWS's side of the pinned egress: the policies that make it count, and an evaluator that shows what a policy
// leaves open. It is pure: nothing here talks to AWS.
//
// What a policy must hold against is a stolen key or session used from elsewhere. Three facts decide the texts
// (docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html and …_condition-keys.html):
//
//   - Any matching Deny wins over every Allow, so that only a Deny holds whatever else is attached.
//   - A negated condition (NotIpAddress, StringNotEquals, ArnNotLike) holds where its key is absent, with IfExists or without:
//     a Deny by it stays closed.
//   - A session carries the policies of its role, never the conditions under which it was assumed.
package awsiam
