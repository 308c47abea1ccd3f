package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// The forms of the log, as -log-format names them.
const (
	formatAuto = "auto"
	formatText = "text"
	formatJSON = "json"
)

// newLogger returns flowctl's own log. Durations are shown as Go writes them, such
// as 1.5s, in JSON too.
func newLogger(w io.Writer, format string, level slog.Level) *slog.Logger {
	readable := func(groups []string, a slog.Attr) slog.Attr {
		switch {
		case a.Value.Kind() == slog.KindDuration:
			a.Value = slog.StringValue(a.Value.Duration().String())
		case a.Key == slog.TimeKey && len(groups) == 0 && format != formatJSON:
			a.Value = slog.StringValue(a.Value.Time().Format(time.TimeOnly))
		}
		return a
	}
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: readable}
	if format == formatJSON {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// enumerate lists a few of many.
func enumerate(ids []string) string {
	const most = 5
	if len(ids) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(ids[:most], ", "), len(ids)-most)
	}
	return strings.Join(ids, ", ")
}

// listing is one row of list: a service, in the words of -json.
type listing struct {
	ID         string         `json:"id"`
	Component  string         `json:"component,omitempty"` // "" when not in the pipeline
	Type       string         `json:"type"`
	Health     string         `json:"health"`
	Healthy    bool           `json:"healthy"`
	Endpoint   string         `json:"endpoint,omitempty"`
	LastSeen   time.Time      `json:"last_seen"`
	Registered *time.Time     `json:"registered_at,omitempty"`
	Metrics    map[string]any `json:"metrics,omitempty"`
}

// fetchListing asks the plane at endpoint for all services. With wait it gives a
// plane that is just starting until ctx ends.
func fetchListing(ctx context.Context, endpoint string, wait bool) ([]listing, error) {
	conn, err := grpc.NewClient(endpoint,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(wait), grpc.MaxCallRecvMsgSize(1<<30)),
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	services, err := flowctlpb.NewControlPlaneClient(conn).ListServices(ctx, &emptypb.Empty{})
	if err != nil {
		return nil, err
	}
	rows := make([]listing, 0, len(services.GetServices()))
	byID := make(map[string]*listing)
	for _, s := range services.GetServices() {
		rows = append(rows, legacyListing(s))
		byID[s.GetServiceId()] = &rows[len(rows)-1]
	}
	// A plane without the v1 dialect has told all that it can.
	if more, err := flowctlv1.NewControlPlaneServiceClient(conn).ListComponents(ctx, &flowctlv1.ListComponentsRequest{IncludeUnhealthy: true}); err == nil {
		for _, c := range more.GetComponents() {
			if row := byID[c.GetComponent().GetId()]; row != nil {
				row.addV1(c)
			}
		}
	}
	return rows, nil
}

func legacyListing(s *flowctlpb.ServiceStatus) listing {
	l := listing{
		ID: s.GetServiceId(), Component: s.GetComponentId(), Healthy: s.GetIsHealthy(), LastSeen: s.GetLastHeartbeat().AsTime(),
		Type:   strings.ToLower(strings.TrimPrefix(s.GetServiceType().String(), "SERVICE_TYPE_")),
		Health: map[bool]string{true: "healthy", false: "unhealthy"}[s.GetIsHealthy()],
	}
	for name, f := range s.GetMetrics() {
		l.setMetric(name, f)
	}
	return l
}

// setMetric keeps a number as a number unless JSON has none such, as for infinity.
func (l *listing) setMetric(name string, value any) {
	if l.Metrics == nil {
		l.Metrics = make(map[string]any)
	}
	if _, err := json.Marshal(value); err != nil {
		value = fmt.Sprint(value)
	}
	l.Metrics[name] = value
}

// addV1 adds what only the v1 dialect tells.
func (l *listing) addV1(c *flowctlv1.ComponentStatusResponse) {
	l.Health = strings.ToLower(strings.TrimPrefix(c.GetStatus().String(), "HEALTH_STATUS_"))
	l.Endpoint = c.GetComponent().GetEndpoint()
	registered := c.GetRegisteredAt().AsTime()
	l.Registered = &registered
	for name, text := range c.GetMetrics() {
		if _, number := l.Metrics[name]; !number {
			l.setMetric(name, text)
		}
	}
}

// writeTable shows rows to a person.
func writeTable(w io.Writer, rows []listing, now time.Time) error {
	tw := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintln(tw, "ID\tTYPE\tHEALTH\tLAST SEEN\tENDPOINT\tMETRICS")
	pipeline := slices.ContainsFunc(rows, func(l listing) bool { return l.Component != "" })
	for _, r := range rows {
		id := clean(r.ID)
		switch {
		case r.Component == r.ID || !pipeline:
		case r.Component == "":
			id += " (not in the pipeline)"
		default:
			id += " (" + clean(r.Component) + ")"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", id, r.Type, r.Health, ago(now.Sub(r.LastSeen)), cmp.Or(clean(r.Endpoint), "-"), r.metricsText())
	}
	return tw.Flush()
}

func ago(d time.Duration) string {
	if d < 10*time.Second {
		return max(d, 0).Round(100*time.Millisecond).String() + " ago"
	}
	return d.Round(time.Second).String() + " ago"
}

// metricsText shows the first few metrics by name.
func (l listing) metricsText() string {
	var parts []string
	for name, value := range l.Metrics {
		if f, ok := value.(float64); ok {
			value = fmt.Sprintf("%.6g", f)
		}
		parts = append(parts, clean(fmt.Sprintf("%s=%v", name, value)))
	}
	slices.Sort(parts)
	return cmp.Or(enumerate(parts), "-")
}

// clean makes text that a component chose fit for a table: control characters and
// bytes that are no UTF-8 become a mark, and long texts are cut.
func clean(text string) string {
	const most = 60
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == utf8.RuneError || r == '\u2028' || r == '\u2029' {
			return '\uFFFD'
		}
		return r
	}, text)
	if utf8.RuneCountInString(text) > most {
		text = string([]rune(text)[:most-3]) + "..."
	}
	return text
}

// writeJSON shows rows to a program: one array.
func writeJSON(w io.Writer, rows []listing) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(rows)
}
