package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"
)

// instance is what EC2 says of the machine; zero fields are unknown.
type instance struct {
	Address       netip.Addr // public, IPv4
	Region        string
	SecurityGroup string // the first one's id
}

var (
	regionForm = regexp.MustCompile(`^[a-z]{2,4}(-[a-z]+)+-[0-9]{1,2}$`)
	macForm    = regexp.MustCompile(`^[0-9a-f]{2}(:[0-9a-f]{2}){5}$`)
	groupForm  = regexp.MustCompile(`^sg-[0-9a-f]{8,17}$`)
)

// askEC2 asks the instance metadata service, version 2
// (https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html), for a second at most. The two
// environment variables are those of AWS's own programs. No answer is no error: most machines are no instance.
func askEC2(ctx context.Context) (i instance) {
	if strings.EqualFold(os.Getenv("AWS_EC2_METADATA_DISABLED"), "true") {
		return i
	}
	base := os.Getenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
	if base == "" {
		base = "http://169.254.169.254"
	}
	base = strings.TrimRight(base, "/") + "/latest/"
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	// A transport of its own: the environment's proxy must not be asked about a link-local address.
	// The service is on the machine's own host: who has not answered by then is none, and init goes on.
	dialer := &net.Dialer{Timeout: 200 * time.Millisecond}
	client := &http.Client{Transport: &http.Transport{DialContext: dialer.DialContext}}
	defer client.CloseIdleConnections()
	ask := func(method, path, header, value string) string {
		req, err := http.NewRequestWithContext(ctx, method, base+path, nil)
		if err != nil {
			return ""
		}
		req.Header.Set(header, value)
		res, err := client.Do(req)
		if err != nil {
			return ""
		}
		defer res.Body.Close()
		body, err := io.ReadAll(io.LimitReader(res.Body, 4096))
		if err != nil || res.StatusCode != http.StatusOK {
			return ""
		}
		return strings.TrimSpace(string(body))
	}
	token := ask("PUT", "api/token", "X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "60")
	if token == "" {
		return i
	}
	get := func(path string) string {
		return ask("GET", "meta-data/"+path, "X-Aws-Ec2-Metadata-Token", token)
	}
	if a, err := netip.ParseAddr(get("public-ipv4")); err == nil {
		i.Address = a
	}
	// Outside AWS anybody may answer at that address, and what he says ends in a command line that a person copies.
	i.Region = regionForm.FindString(get("placement/region"))
	if mac := macForm.FindString(get("mac")); mac != "" {
		first, _, _ := strings.Cut(get("network/interfaces/macs/"+mac+"/security-group-ids"), "\n")
		i.SecurityGroup = groupForm.FindString(first)
	}
	return i
}
