package client

import (
	"slices"
	"strings"
	"testing"
	"time"

	"perimeterd/knock"
)

func TestEnvironmentThatLeadsPastTheProxy(t *testing.T) {
	const ours = "http://10.77.0.1:3128"
	tests := []struct {
		name    string
		environ []string
		proxy   string
		want    []string // codes, of what is not well
	}{
		{"nothing set", []string{"HOME=/root"}, ours, nil},
		{"as vpn env sets it", []string{"https_proxy=" + ours, "HTTPS_PROXY=" + ours, "http_proxy=" + ours,
			"NO_PROXY=localhost,127.0.0.1,::1,169.254.169.254,169.254.170.2"}, ours, nil},
		{"without a scheme", []string{"https_proxy=10.77.0.1:3128"}, ours, nil},
		{"with the credential of vpn exec", []string{"https_proxy=http://a:b@127.0.0.1:40123"}, "http://127.0.0.1:40123", nil},
		{"a proxy of the office", []string{"HTTPS_PROXY=http://proxy.corp.example:8080"}, ours, []string{CodeBypass}},
		{"the same while the tunnel is down", []string{"HTTPS_PROXY=http://proxy.corp.example:8080"}, "", []string{CodeBypass}},
		{"ours while the tunnel is down", []string{"https_proxy=" + ours}, "", nil},
		{"a local listener while it is down", []string{"https_proxy=http://127.0.0.1:3128"}, "", nil},
		{"cases that differ", []string{"https_proxy=" + ours, "HTTPS_PROXY=http://other.example:1"}, ours, []string{CodeVariables, CodeBypass}},
		{"all_proxy", []string{"ALL_PROXY=socks5://198.51.100.9:1080"}, ours, []string{CodeBypass}},
		{"no_proxy names AWS", []string{"no_proxy=.amazonaws.com"}, ours, []string{CodeLeak}},
		{"no_proxy names one region", []string{"NO_PROXY=localhost,ec2.eu-central-1.amazonaws.com"}, ours, []string{CodeLeak}},
		{"no_proxy is everything", []string{"no_proxy=*"}, ours, []string{CodeLeak}},
		{"no_proxy names the console", []string{"no_proxy=aws.amazon.com"}, ours, []string{CodeLeak}},
		{"no_proxy names others", []string{"no_proxy=.internal.example,10.0.0.0/8,notamazonaws.com"}, ours, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, f := range environment(tt.environ, strings.Fields(tt.proxy)...) {
				if f.Status != Well {
					got = append(got, f.Code)
				}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func TestClockOffsetKnowsWhatItDoesNotKnow(t *testing.T) {
	gate := time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC) // and up to a second later
	for _, tt := range []struct {
		sent, received time.Duration
		want           time.Duration
	}{
		{0, 100 * time.Millisecond, 0},
		{-300 * time.Millisecond, 0, 0},
		{900 * time.Millisecond, 1200 * time.Millisecond, 0},
		{-2 * time.Second, 3 * time.Second, 0}, // a slow answer tells nothing
		{61 * time.Second, 62 * time.Second, time.Minute},
		{-61 * time.Second, -60 * time.Second, -time.Minute},
	} {
		if got := clockOffset(gate.Add(tt.sent), gate.Add(tt.received), gate); got != tt.want {
			t.Errorf("sent at %v, received at %v: %v, want %v", tt.sent, tt.received, got, tt.want)
		}
	}
}

func TestEarlierStepsCoverDriftAndTimeZonesAndNothingToCome(t *testing.T) {
	now := time.Date(2026, 5, 1, 12, 0, 17, 0, time.UTC)
	for _, length := range []time.Duration{knock.MinStep, 30 * time.Second, time.Hour} {
		steps, here := earlierSteps(now, length), knock.StepAt(now, length)
		if len(steps) > 250 {
			t.Errorf("%v: %d tokens", length, len(steps))
		}
		if !slices.IsSorted(steps) || steps[len(steps)-1] > here-3 {
			t.Errorf("%v steps, of which %d is this one: %d", length, here, steps)
		}
		for _, off := range []time.Duration{10 * time.Minute, 5 * time.Minute, time.Hour, 5*time.Hour + 30*time.Minute, 14 * time.Hour} {
			if at := knock.StepAt(now.Add(-off), length); at < here-2 && !slices.Contains(steps, at) {
				t.Errorf("%v steps: none for a clock that is %v fast", length, off)
			}
		}
	}
}

func TestPlainKeysAreThoseWithoutAToken(t *testing.T) {
	text := "[default]\naws_access_key_id = A\naws_secret_access_key = s\n\n[session]\naws_secret_access_key=s\naws_session_token=t\n[empty]\naws_secret_access_key =\n[two]\naws_secret_access_key=s"
	if got := plainKeysIn([]byte(text)); !slices.Equal(got, []string{"default", "two"}) {
		t.Error(got)
	}
	if got := plainKeysIn([]byte("\x00garbage = [")); got != nil {
		t.Error(got)
	}
}
