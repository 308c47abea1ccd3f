// Demo is what a component of a flowctl pipeline looks like, in all three
// roles: a source that reads this machine's counters (or a file's lines), a
// processor that turns counters into rates, and a sink that writes JSON lines.
// This file is what flowctl asks of a component, roles.go the work, feed.go the
// stream between two of them; ../demo.json runs them.
//
// Those three dial each other. The roles of events.go, which ../lines.json runs,
// do not: they serve, and flowctl moves the events between them.
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

const (
	version = "1.0.0"

	registerTimeout  = 5 * time.Second
	heartbeatTimeout = 2 * time.Second
)

const usage = `usage: demo source [-file PATH] [-interval DURATION]
       demo processor
       demo sink [-out FILE]
       demo lines | words | tally
       demo flood | pass | count
`

func main() {
	roles := map[string]func(context.Context, []string) error{
		"source": source, "processor": processor, "sink": sink,
		"lines": lines, "words": words, "tally": tally,
		"flood": flood, "pass": pass, "count": count,
	}
	if len(os.Args) < 2 || roles[os.Args[1]] == nil {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	stop, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(stop, release) // a second signal kills
	if err := roles[os.Args[1]](stop, os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "demo %s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

// listen listens on all interfaces at PORT, such as :50051, or without it on a free port of the loopback. The
// endpoint is what is to be registered: flowctl completes one without a host.
func listen() (listener net.Listener, endpoint string, err error) {
	port := os.Getenv("PORT")
	if port == "" {
		port = "127.0.0.1:0"
	} else if !strings.Contains(port, ":") {
		port = ":" + port
	}
	if listener, err = net.Listen("tcp", port); err != nil {
		return nil, "", err
	}
	endpoint = listener.Addr().String()
	if strings.HasPrefix(port, ":") {
		endpoint = endpoint[strings.LastIndexByte(endpoint, ':'):]
	}
	return listener, endpoint, nil
}

// membership is a component's registration with the control plane. Heartbeats
// keep it alive until leave.
type membership struct {
	connections map[string]string // connection_info, as onlyInput reads it
	records     atomic.Int64      // handled so far, for the heartbeats to tell

	leave func() // ends the heartbeats; flowctl itself sees the component end
}

// join registers the component that flowctl's environment variables describe;
// info lacks only the identity. Its endpoint must be listening already, since
// others may connect before join returns. The caller must call leave.
func join(info *flowctlv1.ComponentInfo) (*membership, error) {
	if v := os.Getenv("ENABLE_FLOWCTL"); v != "true" {
		return nil, fmt.Errorf("ENABLE_FLOWCTL is %q, not \"true\": start me with flowctl -f testdata/demo.json", v)
	}
	endpoint, id := os.Getenv("FLOWCTL_ENDPOINT"), os.Getenv("FLOWCTL_COMPONENT_ID")
	if endpoint == "" || id == "" {
		return nil, errors.New("FLOWCTL_ENDPOINT and FLOWCTL_COMPONENT_ID must be set")
	}
	interval, err := time.ParseDuration(os.Getenv("FLOWCTL_HEARTBEAT_INTERVAL"))
	if err != nil || interval <= 0 {
		return nil, fmt.Errorf("FLOWCTL_HEARTBEAT_INTERVAL is %q, not a duration such as 10000ms", os.Getenv("FLOWCTL_HEARTBEAT_INTERVAL"))
	}
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("control plane %q: %w", endpoint, err)
	}
	plane := flowctlv1.NewControlPlaneServiceClient(conn)

	info.Id, info.Name, info.Version = id, id, version
	ctx, cancel := context.WithTimeout(context.Background(), registerTimeout)
	defer cancel()
	reply, err := plane.RegisterComponent(ctx, &flowctlv1.RegisterRequest{Component: info, ComponentId: id})
	if err != nil {
		_ = conn.Close()
		return nil, fmt.Errorf("cannot register %q with %q: %w", id, endpoint, err)
	}

	m := &membership{connections: reply.ConnectionInfo}
	told, toldAt := int64(0), time.Now()
	quit := every(interval, func(ctx context.Context) {
		ctx, cancel := context.WithTimeout(ctx, heartbeatTimeout)
		defer cancel()
		records, now := m.records.Load(), time.Now()
		perSecond := float64(records-told) / now.Sub(toldAt).Seconds()
		told, toldAt = records, now
		_, err := plane.Heartbeat(ctx, &flowctlv1.HeartbeatRequest{
			ServiceId: reply.ServiceId, // not always the id that was asked for
			Status:    flowctlv1.HealthStatus_HEALTH_STATUS_HEALTHY,
			Metrics: map[string]string{
				"records":            strconv.FormatInt(records, 10),
				"records_per_second": strconv.FormatFloat(perSecond, 'f', 1, 64),
			},
		})
		// The next heartbeat makes up for one that fails.
		if err != nil && ctx.Err() != context.Canceled {
			fmt.Fprintf(os.Stderr, "heartbeat: %v\n", err)
		}
	})
	m.leave = func() {
		quit()
		_ = conn.Close()
	}
	return m, nil
}

// onlyInput returns the endpoint of the one input that connectionInfo names.
func onlyInput(connectionInfo map[string]string) (endpoint string, err error) {
	inputs := 0
	for id, e := range connectionInfo {
		if id != "control_plane_endpoint" {
			endpoint = e
			inputs++
		}
	}
	if inputs != 1 {
		return "", fmt.Errorf("connection_info names %d inputs, not 1: %v", inputs, connectionInfo)
	}
	return endpoint, nil
}

// every calls f each interval until quit is called. quit cancels the context of
// a call that is under way, and waits for it; it may be called again.
func every(interval time.Duration, f func(context.Context)) (quit func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				f(ctx)
			case <-ctx.Done():
				return
			}
		}
	})
	return func() {
		cancel()
		running.Wait()
	}
}
