package console

import (
	"errors"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"perimeterd/internal/event"
	"perimeterd/internal/session"
	"perimeterd/proxy"
)

// Fill is how many elements a set of the firewall's table holds, and how many it can hold; a size of 0 is no bound. It is
// an alias so that the firewall can return it without knowing this package.
type Fill = struct{ Elements, Size int }

// Sets is what is asked of the firewall's table.
type Sets interface {
	Fill() (map[string]Fill, error)
}

// Sources are asked at each scrape: every one must be there, and quick.
type Sources struct {
	Sets        Sets
	Owned       func() bool // see TableOwned
	Pending     func() int  // see SessionsPending
	Connections func() int  // see ProxyConnections
	AuditLost   func() uint64
}

// Metrics takes what happens in the daemon. Its methods may be called from anywhere, and wait for nobody.
type Metrics struct {
	reg     prometheus.Registerer
	started time.Time

	opened, events                      *prometheus.CounterVec
	missed, suppressed, repairs, tokens prometheus.Counter
	repairTime, step, live              prometheus.Gauge
	loadTime, proxyTime                 prometheus.Histogram
	begun                               prometheus.Counter
	gate, ended                         *prometheus.CounterVec
	requests, bytes                     *prometheus.CounterVec
	userRequests, userBytes             *prometheus.CounterVec

	mu      sync.Mutex
	users   map[string]struct{}
	highest int64 // step
}

// NewMetrics registers everything but what Ask does, Go's and the process's own metrics too. Started tells sessions that
// begin from those that come back.
func NewMetrics(reg prometheus.Registerer, version string, started time.Time) (*Metrics, error) {
	m := &Metrics{reg: reg, started: started, users: map[string]struct{}{}}
	var all []prometheus.Collector
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
		all = append(all, c)
		return c
	}
	counter := func(name, help string) prometheus.Counter { return counters(name, help).WithLabelValues() }
	gauge := func(name, help string) prometheus.Gauge {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
		all = append(all, g)
		return g
	}
	histogram := func(name, help string, buckets ...float64) prometheus.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
		all = append(all, h)
		return h
	}

	m.opened = counters(WindowsOpened, "Windows that the kernel opened, by kind of knock.", "kind")
	m.missed = counter(OpeningsMissed, "Times that the kernel's log of openings outran the daemon.")
	m.events = counters(EventsTotal, "Events at the door, by kind, suppressed ones included.", "kind")
	m.suppressed = counter(EventsUnlogged, "Events that were counted and not logged: their sources had had enough.")
	m.repairs = counter(Repairs, "Times that the nftables table was repaired after another tool changed it.")
	m.repairTime = gauge(RepairTime, "How long the last repair took.")
	m.loadTime = histogram(TokenLoadTime, "Time to load tokens into the kernel.", .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5)
	m.tokens = counter(TokensLoaded, "Tokens loaded into the kernel.")
	m.step = gauge(TokenStep, "Highest step whose tokens are loaded.")
	m.gate = counters(GateRequests, "Requests of the session API, by outcome.", "code")
	m.live = gauge(SessionsLive, "Live sessions.")
	m.begun = counter(SessionsBegun, "Sessions that began.")
	m.ended = counters(SessionsEnded, "Sessions that ended, by reason.", "reason")
	m.requests = counters(ProxyRequests, "Requests to the proxy, by decision and reason.", "decision", "reason")
	m.bytes = counters(ProxyBytes, "Bytes of proxied connections, by direction.", "direction")
	m.proxyTime = histogram(ProxyTime, "Duration of requests that reached their destination.", .01, .05, .25, 1, 5, 30, 120, 600, 3600, 14400, 86400)
	m.userRequests = counters(UserRequests, "Requests to the proxy, by user and decision.", "user", "decision")
	m.userBytes = counters(UserBytes, "Bytes of proxied connections, by user and direction.", "user", "direction")

	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: BuildInfo, Help: "The running version."}, []string{"version", "go_version"})
	build.WithLabelValues(version, runtime.Version()).Set(1)
	all = append(all, build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	// Series that alerts compute with exist from the start: a rate over one that appears misses its first event.
	m.opened.WithLabelValues("token")
	m.opened.WithLabelValues("sequence")
	for _, k := range []event.Kind{event.Opened, event.TokenRefused, event.TokenReplayed, event.SequenceReset, event.WindowsFull} {
		m.events.WithLabelValues(string(k))
	}
	for _, r := range []session.Reason{session.Deleted, session.Expired, session.Replaced, session.Revoked, session.Kicked} {
		m.ended.WithLabelValues(string(r))
	}
	m.gate.WithLabelValues("ok")

	return m, m.register(all...)
}

// Ask makes every scrape ask the sources, once they are there.
func (m *Metrics) Ask(from Sources) error {
	gauge := func(name, help string, ask func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, ask)
	}
	return m.register(sets{from.Sets},
		gauge(TableOwned, "Whether the nftables table is owned, so that other tools cannot change it.", func() float64 {
			if from.Owned() {
				return 1
			}
			return 0
		}),
		gauge(SessionsPending, "Live sessions through whose tunnel no packet came yet.", func() float64 { return float64(from.Pending()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{Name: AuditLost, Help: "Records that are missing in the audit: its disk was full or too slow."},
			func() float64 { return float64(from.AuditLost()) }),
		gauge(ProxyConnections, "Live connections of clients to the proxy.", func() float64 { return float64(from.Connections()) }))
}

func (m *Metrics) register(all ...prometheus.Collector) error {
	var errs []error
	for _, c := range all {
		errs = append(errs, m.reg.Register(c))
	}
	return errors.Join(errs...)
}

// Event counts an event at the door. Written is event.Log's word.
func (m *Metrics) Event(e event.Event, written bool) {
	m.events.WithLabelValues(string(e.Kind)).Inc()
	if !written {
		m.suppressed.Inc()
	}
	if e.Kind == event.Opened {
		kind := "token"
		if e.Sequence {
			kind = "sequence"
		}
		m.opened.WithLabelValues(kind).Inc()
	}
}

// Missed counts a time that openings were lost.
func (m *Metrics) Missed() { m.missed.Inc() }

// Repaired counts a repair of the table.
func (m *Metrics) Repaired(took time.Duration) {
	m.repairs.Inc()
	m.repairTime.Set(took.Seconds())
}

// Loaded counts one load of n tokens of a step.
func (m *Metrics) Loaded(n int, step int64, took time.Duration) {
	m.mu.Lock()
	m.highest = max(m.highest, step) // a new user's tokens are of earlier steps too
	m.step.Set(float64(m.highest))
	m.mu.Unlock()
	m.tokens.Add(float64(n))
	m.loadTime.Observe(took.Seconds())
}

// GateRequest counts a request of the session API by its stable code; empty is a success.
func (m *Metrics) GateRequest(code string) {
	if code == "" {
		code = "ok"
	}
	m.gate.WithLabelValues(code).Inc()
}

// SessionEvent is a session.Store watcher.
func (m *Metrics) SessionEvent(e session.Event) {
	if e.Ended != "" {
		m.live.Dec()
		m.ended.WithLabelValues(string(e.Ended)).Inc()
		return
	}
	m.live.Inc()
	if !e.Session.Created.Before(m.started) {
		m.begun.Inc()
	}
}

// Access is a watcher of the proxy.
func (m *Metrics) Access(a proxy.Access) {
	decision := "deny"
	switch {
	case a.Decision.Observed:
		decision = "observe"
	case a.Decision.Allow:
		decision = "allow"
	}
	m.requests.WithLabelValues(decision, string(a.Decision.Reason)).Inc()
	m.userRequests.WithLabelValues(m.user(a.User), decision).Inc()
	if a.Dialed.IsValid() {
		m.proxyTime.Observe(a.Duration.Seconds())
	}
}

// Traffic counts bytes of a user's connections as they move.
func (m *Metrics) Traffic(user string, up, down int64) {
	user = m.user(user)
	m.bytes.WithLabelValues("up").Add(float64(up))
	m.bytes.WithLabelValues("down").Add(float64(down))
	m.userBytes.WithLabelValues(user, "up").Add(float64(up))
	m.userBytes.WithLabelValues(user, "down").Add(float64(down))
}

// user is the label that stands for a user.
func (m *Metrics) user(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, ok := m.users[name]; ok {
		return name
	}
	if len(m.users) == MaxUsers {
		return OtherUsers
	}
	m.users[name] = struct{}{}
	return name
}

// sets asks for the fill of the table's sets at each scrape.
type sets struct{ Sets }

var (
	elementsDesc = prometheus.NewDesc(SetElements, "Elements of a set of the nftables table.", []string{"set"}, nil)
	ratioDesc    = prometheus.NewDesc(SetRatio, "How full a set of the nftables table is, 0 to 1.", []string{"set"}, nil)
)

func (s sets) Describe(ch chan<- *prometheus.Desc) {
	ch <- elementsDesc
	ch <- ratioDesc
}

func (s sets) Collect(ch chan<- prometheus.Metric) {
	all, err := s.Fill()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(ratioDesc, err)
		return
	}
	for name, f := range all {
		ch <- prometheus.MustNewConstMetric(elementsDesc, prometheus.GaugeValue, float64(f.Elements), name)
		if f.Size > 0 {
			ch <- prometheus.MustNewConstMetric(ratioDesc, prometheus.GaugeValue, ratio(f), name)
		}
	}
}
