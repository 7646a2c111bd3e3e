package control

import "context"

// What is done with the built-in CA, as the audit calls it.
const (
	CARotate = "rotate" // another issues from now on
	CAFinish = "finish" // and the one before is not trusted any more
)

// TakeUpAuthority makes the daemon read the CA's certificates and the gate's again, after act was done to them. Without a
// daemon there is nothing to do.
func (o *Operations) TakeUpAuthority(_ context.Context, act string) error {
	o.Log.Info("certificate authority changed", "act", act)
	if o.Authority == nil {
		return nil
	}
	return o.Authority()
}

// TakeUpAuthority is Operations.TakeUpAuthority.
func (c *Client) TakeUpAuthority(ctx context.Context, act string) error {
	return c.do(ctx, "POST", "/v1/authority/"+act, nil, nil)
}
