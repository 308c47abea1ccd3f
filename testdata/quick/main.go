// Quick is a component that does nothing but register and live: the load of the
// readiness benchmark.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "quick:", err)
		os.Exit(1)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	conn, err := grpc.NewClient(os.Getenv("FLOWCTL_ENDPOINT"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	client := flowctlpb.NewControlPlaneClient(conn)
	ack, err := client.Register(ctx, &flowctlpb.ServiceInfo{
		ServiceId:      os.Getenv("FLOWCTL_COMPONENT_ID"),
		HealthEndpoint: os.Getenv("HEALTH_ENDPOINT"),
	})
	if err != nil {
		return err
	}
	interval, err := time.ParseDuration(os.Getenv("FLOWCTL_HEARTBEAT_INTERVAL"))
	if err != nil {
		interval = 10 * time.Second
	}
	ticker := time.NewTicker(interval)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
			// One that is lost is made up for by the next.
			_, _ = client.Heartbeat(ctx, &flowctlpb.ServiceHeartbeat{ServiceId: ack.GetServiceId()})
		}
	}
}
