//go:build linux

package lab

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
)

// Usage is what a process has taken so far, and holds.
type Usage struct {
	CPU     time.Duration // user and system, children aside; in ticks of 10 ms
	RSS     int           // bytes
	FDs     int
	Threads int
}

// UsageOf reads it from /proc.
func UsageOf(pid int) (u Usage, err error) {
	p, err := procfs.NewProc(pid)
	if err != nil {
		return u, err
	}
	stat, err := p.Stat()
	if err != nil {
		return u, err
	}
	fds, err := p.FileDescriptorsLen()
	return Usage{time.Duration(stat.CPUTime() * float64(time.Second)), stat.ResidentMemory(), fds, stat.NumThreads}, err
}

// Traffic counts IPv4 packets since the namespace was made.
type Traffic struct {
	Received  int // came in from the wire and reached the IP layer, so the firewall
	Delivered int // came past the firewall, to TCP, UDP or ICMP
}

// Traffic reads the counters (SNMP's ipInReceives and ipInDelivers, RFC 4293).
func (n *Namespace) Traffic() (t Traffic, err error) {
	err = n.Do(func() error {
		p, err := procfs.NewProc(unix.Gettid())
		if err != nil {
			return err
		}
		s, err := p.Snmp()
		if err != nil {
			return err
		}
		if s.Ip.InReceives == nil || s.Ip.InDelivers == nil {
			return fmt.Errorf("namespace %s: /proc/net/snmp has no Ip counters", n.Name)
		}
		t = Traffic{int(*s.Ip.InReceives), int(*s.Ip.InDelivers)}
		return nil
	})
	return t, err
}

// PID is the running daemon's.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Usage is the daemon's.
func (d *Daemon) Usage() (Usage, error) { return UsageOf(d.PID()) }

// Metrics is one scrape of /metrics.
type Metrics map[string]*io_prometheus_client.MetricFamily

// Metrics asks the daemon, whose console.metrics must be address.
func (d *Daemon) Metrics(ctx context.Context, address string) (Metrics, error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, // a connection that stays would count among the daemon's descriptors
		DialContext: func(ctx context.Context, network, to string) (net.Conn, error) {
			return d.lab.Bastion.Dial(ctx, network, to)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("metrics: %s: %s", resp.Status, text)
	}
	if err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(strings.NewReader(string(text)))
}

// Value is a gauge's, counter's or untyped metric's with these labels, given as name, value, ...; an error if there is none.
func (m Metrics) Value(name string, labels ...string) (float64, error) {
	for _, metric := range m[name].GetMetric() {
		if !hasLabels(metric, labels) {
			continue
		}
		switch {
		case metric.Gauge != nil:
			return metric.Gauge.GetValue(), nil
		case metric.Counter != nil:
			return metric.Counter.GetValue(), nil
		}
	}
	return 0, fmt.Errorf("metrics: no gauge or counter %s %q", name, labels)
}

// Histogram is the one of that name, without labels.
func (m Metrics) Histogram(name string) (*io_prometheus_client.Histogram, error) {
	if all := m[name].GetMetric(); len(all) == 1 && all[0].Histogram != nil {
		return all[0].Histogram, nil
	}
	return nil, fmt.Errorf("metrics: no histogram %s", name)
}

func hasLabels(m *io_prometheus_client.Metric, labels []string) bool {
	have := map[string]string{}
	for _, l := range m.GetLabel() {
		have[l.GetName()] = l.GetValue()
	}
	for i := 0; i+1 < len(labels); i += 2 {
		if have[labels[i]] != labels[i+1] {
			return false
		}
	}
	return true
}
