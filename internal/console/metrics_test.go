package console

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"perimeterd/internal/event"
	"perimeterd/internal/session"
	"perimeterd/proxy"
)

// table is a firewall's table of which only the fill is known.
type table struct {
	fill map[string]Fill
	err  error
}

func (t *table) Fill() (map[string]Fill, error) { return t.fill, t.err }

var started = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func newMetrics(t *testing.T, sets Sets) (*Metrics, *prometheus.Registry) {
	t.Helper()
	reg := prometheus.NewRegistry()
	m, err := NewMetrics(reg, "1.2.3", started)
	if err != nil {
		t.Fatal(err)
	}
	err = m.Ask(Sources{Sets: sets, Owned: func() bool { return true }, Pending: func() int { return 2 }, Connections: func() int { return 7 }, AuditLost: func() uint64 { return 5 }})
	if err != nil {
		t.Fatal(err)
	}
	return m, reg
}

// expect compares metrics with the text of a scrape, comments left out.
func expect(t *testing.T, reg prometheus.Gatherer, want string) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Error(err)
	}
	got := map[string]string{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, fmt.Sprintf("%s=%q", l.GetName(), l.GetValue()))
			}
			if labels != nil {
				name += "{" + strings.Join(labels, ",") + "}"
			}
			switch {
			case m.GetCounter() != nil:
				got[name] = fmt.Sprint(m.GetCounter().GetValue())
			case m.GetGauge() != nil:
				got[name] = fmt.Sprint(m.GetGauge().GetValue())
			case m.GetHistogram() != nil:
				got[name] = fmt.Sprint(m.GetHistogram().GetSampleCount(), " in ", m.GetHistogram().GetSampleSum())
			}
		}
	}
	for line := range strings.Lines(want) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name != "" && got[name] != value {
			t.Errorf("%s is %q, want %s", name, got[name], value)
		}
	}
}

func TestMetricsSayWhatHappened(t *testing.T) {
	m, reg := newMetrics(t, &table{fill: map[string]Fill{"open4": {16384, 65536}, "reach": {3, 0}}})
	source := netip.MustParseAddr("198.51.100.7")
	m.Event(event.Event{Kind: event.Opened, Source: source}, true)
	m.Event(event.Event{Kind: event.Opened, Source: source, Sequence: true}, false)
	m.Event(event.Event{Kind: event.TokenRefused, Source: source}, false)
	m.Missed()
	m.Repaired(30 * time.Millisecond)
	m.Repaired(20 * time.Millisecond)
	m.Loaded(1000, 41, 10*time.Millisecond)
	m.Loaded(500, 42, 5*time.Millisecond)
	m.Loaded(3, 40, 5*time.Millisecond)
	m.GateRequest("")
	m.GateRequest("revoked")
	m.SessionEvent(session.Event{Session: session.Session{Created: started.Add(-time.Hour)}}) // back after a restart
	m.SessionEvent(session.Event{Session: session.Session{Created: started.Add(time.Second)}})
	m.SessionEvent(session.Event{Session: session.Session{}, Ended: session.Revoked})
	dialed := netip.MustParseAddrPort("203.0.113.1:443")
	m.Access(proxy.Access{User: "alice", Decision: proxy.Decision{Allow: true, Reason: proxy.Allowed}, Dialed: dialed, Duration: 3 * time.Second})
	m.Access(proxy.Access{User: "alice", Decision: proxy.Decision{Allow: true, Observed: true, Reason: proxy.NoRule}, Dialed: dialed, Duration: time.Second})
	m.Access(proxy.Access{User: "bob", Decision: proxy.Decision{Reason: proxy.DeniedByRule}, Duration: time.Second})
	m.Traffic("alice", 10, 2000)
	m.Traffic("alice", 1, 2)
	expect(t, reg, `
		perimeterd_windows_opened_total{kind="token"} 1
		perimeterd_windows_opened_total{kind="sequence"} 1
		perimeterd_events_total{kind="window-opened"} 2
		perimeterd_events_total{kind="token-refused"} 1
		perimeterd_events_total{kind="token-replayed"} 0
		perimeterd_events_suppressed_total 2
		perimeterd_openings_missed_total 1
		perimeterd_set_elements{set="open4"} 16384
		perimeterd_set_fill_ratio{set="open4"} 0.25
		perimeterd_set_elements{set="reach"} 3
		perimeterd_set_fill_ratio{set="reach"} 
		perimeterd_table_owned 1
		perimeterd_table_repairs_total 2
		perimeterd_table_last_repair_duration_seconds 0.02
		perimeterd_token_load_duration_seconds 3 in 0.02
		perimeterd_tokens_loaded_total 1503
		perimeterd_token_step 42
		perimeterd_gate_requests_total{code="ok"} 1
		perimeterd_gate_requests_total{code="revoked"} 1
		perimeterd_sessions_live 1
		perimeterd_sessions_pending 2
		perimeterd_sessions_begun_total 1
		perimeterd_sessions_ended_total{reason="revoked"} 1
		perimeterd_sessions_ended_total{reason="kicked"} 0
		perimeterd_proxy_requests_total{decision="allow",reason="allowed"} 1
		perimeterd_proxy_requests_total{decision="observe",reason="no-rule"} 1
		perimeterd_proxy_requests_total{decision="deny",reason="denied-by-rule"} 1
		perimeterd_proxy_bytes_total{direction="up"} 11
		perimeterd_proxy_bytes_total{direction="down"} 2002
		perimeterd_proxy_connections 7
		perimeterd_audit_records_lost_total 5
		perimeterd_proxy_request_duration_seconds 2 in 4
		perimeterd_proxy_user_requests_total{decision="deny",user="bob"} 1
		perimeterd_proxy_user_bytes_total{direction="down",user="alice"} 2002
		perimeterd_proxy_user_bytes_total{direction="down",user="bob"} 
	`)
}

func TestUsersBeyondTheBoundShareOneSeries(t *testing.T) {
	m, reg := newMetrics(t, &table{})
	for range 3 {
		for i := range 10_000 {
			m.Access(proxy.Access{User: "user" + strconv.Itoa(i), Decision: proxy.Decision{Allow: true, Reason: proxy.Allowed}})
		}
	}
	expect(t, reg, `
		perimeterd_proxy_user_requests_total{decision="allow",user="user0"} 3
		perimeterd_proxy_user_requests_total{decision="allow",user="user199"} 3
		perimeterd_proxy_user_requests_total{decision="allow",user="user200"} 
		perimeterd_proxy_user_requests_total{decision="allow",user="_other"} 29400
	`)
	if n, err := testutil.GatherAndCount(reg, UserRequests); err != nil || n != MaxUsers+1 {
		t.Errorf("%d series, %v; want %d", n, err, MaxUsers+1)
	}
}

func TestSetsThatCannotBeReadHideNoOtherMetric(t *testing.T) {
	m, reg := newMetrics(t, &table{err: errors.New("no table")})
	m.Missed()
	families, err := reg.Gather()
	if err == nil || !strings.Contains(err.Error(), "no table") {
		t.Errorf("Gather: %v", err)
	}
	for _, f := range families {
		if f.GetName() == OpeningsMissed {
			return
		}
	}
	t.Error("the other metrics are gone")
}

func TestNamesKeepTheirPromise(t *testing.T) {
	m, reg := newMetrics(t, &table{fill: map[string]Fill{"open4": {1, 2}}})
	m.GateRequest("")
	m.Access(proxy.Access{User: "alice", Dialed: netip.MustParseAddrPort("203.0.113.1:443")})
	m.Traffic("alice", 1, 2)
	if err := m.AskAuthority(Authority{CRLs: func() []CRL { return []CRL{{"CN=CA", started}} }, Problems: func() int { return 2 }}); err != nil {
		t.Fatal(err)
	}
	expect(t, reg, `
		perimeterd_crl_next_update_timestamp_seconds{issuer="CN=CA"} 1.767323045e+09
		perimeterd_identity_problems 2
	`)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) != 0 {
		t.Errorf("%v %v", problems, err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	exists := map[string]bool{}
	for _, f := range families {
		exists[f.GetName()] = true
	}
	file, err := parser.ParseFile(token.NewFileSet(), "names.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		if l, ok := n.(*ast.BasicLit); ok && strings.HasPrefix(l.Value, `"perimeterd_`) {
			name, _ := strconv.Unquote(l.Value)
			documented[name] = true
			if !exists[name] {
				t.Errorf("%s is not scraped", name)
			}
		}
		return true
	})
	for name := range exists {
		if strings.HasPrefix(name, "perimeterd_") && !documented[name] {
			t.Errorf("%s is not in names.go", name)
		}
	}
	if len(documented) < 20 || !exists["go_goroutines"] || !exists["process_open_fds"] {
		t.Errorf("%d names; Go's own: %v, the process's: %v", len(documented), exists["go_goroutines"], exists["process_open_fds"])
	}
}

func BenchmarkAccess(b *testing.B) {
	m, err := NewMetrics(prometheus.NewRegistry(), "", started)
	if err != nil {
		b.Fatal(err)
	}
	a := proxy.Access{User: "alice", Decision: proxy.Decision{Allow: true, Reason: proxy.Allowed}, Dialed: netip.MustParseAddrPort("203.0.113.1:443")}
	b.ReportAllocs()
	for b.Loop() {
		m.Access(a)
	}
}
