package console

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Bounds of the metrics server. It asks nobody who he is: whoever reaches its address reads the names of users and what
// they move.
const (
	metricsConnections = 16 // more wait in the listener's queue
	metricsScrapes     = 4  // at once; one more is told 503
	metricsTimeout     = 10 * time.Second
	metricsHead        = 8 << 10
)

// Serve answers GET /metrics on address until ctx ends, and nothing else.
func Serve(ctx context.Context, address string, reg *prometheus.Registry) error {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("console.metrics %q: %w", address, err)
	}
	return serve(ctx, l, reg)
}

func serve(ctx context.Context, l net.Listener, reg *prometheus.Registry) error {
	mux := http.NewServeMux()
	// What cannot be collected is left out and counted; the rest is worth having.
	mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{ErrorHandling: promhttp.ContinueOnError, Registry: reg,
		MaxRequestsInFlight: metricsScrapes, Timeout: metricsTimeout}))
	srv := &http.Server{Handler: mux, ReadTimeout: metricsTimeout, WriteTimeout: 2 * metricsTimeout, IdleTimeout: 2 * time.Minute,
		MaxHeaderBytes: metricsHead}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(netutil.LimitListener(l, metricsConnections)); ctx.Err() == nil {
		return fmt.Errorf("console.metrics %v: %w", l.Addr(), err)
	}
	return nil
}
