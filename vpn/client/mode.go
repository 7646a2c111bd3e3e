package client

// NewLink makes a device of the system's where this process may have one, and else one of its own inside this process.
func NewLink() (Link, error) {
	if mayMakeDevice() {
		return NewSystemTUN()
	}
	return NewNetstack()
}
