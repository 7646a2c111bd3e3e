package console

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// CRL is one in force. It is an alias so that the authority's verifier can return it without knowing this package.
type CRL = struct {
	Issuer     string
	NextUpdate time.Time
}

// Authority is what is asked of an external CA's files.
type Authority struct {
	CRLs     func() []CRL
	Problems func() int
}

// AskAuthority makes every scrape ask an external CA's files.
func (m *Metrics) AskAuthority(from Authority) error {
	return m.register(crls(from.CRLs), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: IdentityProblems, Help: "Problems of an external CA's files: expired, soon to expire, missing or bad.",
	}, func() float64 { return float64(from.Problems()) }))
}

type crls func() []CRL

var crlDesc = prometheus.NewDesc(CRLNextUpdate, "When the CRL of an external CA expires, and its users are shut out.", []string{"issuer"}, nil)

func (c crls) Describe(ch chan<- *prometheus.Desc) { ch <- crlDesc }

func (c crls) Collect(ch chan<- prometheus.Metric) {
	for _, l := range c() {
		ch <- prometheus.MustNewConstMetric(crlDesc, prometheus.GaugeValue, float64(l.NextUpdate.Unix()), l.Issuer)
	}
}
