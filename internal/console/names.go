package console

// Names of the metrics. They are stable: alerts and dashboards are written against them. Counters begin at zero with each
// start of the daemon.
const (
	WindowsOpened  = "perimeterd_windows_opened_total"  // by kind: token, sequence
	OpeningsMissed = "perimeterd_openings_missed_total" // times that the kernel's log outran the daemon
	EventsTotal    = "perimeterd_events_total"          // by kind (event.Kind), suppressed ones included
	EventsUnlogged = "perimeterd_events_suppressed_total"

	SetElements = "perimeterd_set_elements"   // by set of the table
	SetRatio    = "perimeterd_set_fill_ratio" // by set: elements / size, 0 to 1; absent for a set without a size
	TableOwned  = "perimeterd_table_owned"    // 1: other tools cannot change the table; 0: changes are repaired
	Repairs     = "perimeterd_table_repairs_total"
	RepairTime  = "perimeterd_table_last_repair_duration_seconds"

	TokenLoadTime = "perimeterd_token_load_duration_seconds" // of one load of tokens into the kernel
	TokensLoaded  = "perimeterd_tokens_loaded_total"
	TokenStep     = "perimeterd_token_step" // the highest whose tokens are loaded

	GateRequests = "perimeterd_gate_requests_total" // by code: ok, or that of the refusal (vpn.APIError)

	SessionsLive    = "perimeterd_sessions_live"
	SessionsPending = "perimeterd_sessions_pending"     // live, and no packet came through the tunnel yet
	SessionsBegun   = "perimeterd_sessions_begun_total" // without those that come back after a restart
	SessionsEnded   = "perimeterd_sessions_ended_total" // by reason (session.Reason)

	CRLNextUpdate    = "perimeterd_crl_next_update_timestamp_seconds" // by issuer; an external CA's: when its CRL expires, and the gate shuts its users out
	IdentityProblems = "perimeterd_identity_problems"                 // of an external CA's files, those included that keep nobody out yet

	ProxyRequests    = "perimeterd_proxy_requests_total"           // by decision (allow, deny, observe) and reason (proxy.Reason)
	ProxyBytes       = "perimeterd_proxy_bytes_total"              // by direction: up is to the destination; counted every few seconds
	ProxyConnections = "perimeterd_proxy_connections"              // of clients, live
	ProxyTime        = "perimeterd_proxy_request_duration_seconds" // of requests that reached their destination, to their end
	UserRequests     = "perimeterd_proxy_user_requests_total"      // by user and decision
	UserBytes        = "perimeterd_proxy_user_bytes_total"         // by user and direction
	AuditLost        = "perimeterd_audit_records_lost_total"       // the disk was full or too slow
	BuildInfo        = "perimeterd_build_info"                     // by version and go_version; 1
)

// MaxUsers is how many users have series of their own, first come first served: a counter whose series went as others
// overtook it would spoil every rate. All others are in OtherUsers, which can be no user's name.
const (
	MaxUsers   = 200
	OtherUsers = "_other"
)
