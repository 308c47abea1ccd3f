package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// probe asks once how a component is by its health_check. It fails with the reason
// why that did not pass; ctx bounds how long it takes. An exec: check runs in the
// folder and the environment of the component's process ch.
func probe(ctx context.Context, check string, ch *child) error {
	if line, ok := strings.CutPrefix(check, "exec:"); ok {
		return probeExec(ctx, strings.Fields(line), ch)
	}
	u, err := url.Parse(check)
	if err != nil {
		return err
	}
	switch u.Scheme {
	case "http", "https":
		return probeHTTP(ctx, check)
	case "tcp":
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", u.Host)
		if err == nil {
			conn.Close()
		}
		return err
	case "grpc":
		return probeGRPC(ctx, u.Host, strings.TrimPrefix(u.Path, "/"))
	}
	return fmt.Errorf("unknown scheme %q", u.Scheme)
}

// probeHTTP passes on any 2xx or 3xx, as a load balancer would.
func probeHTTP(ctx context.Context, check string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, check, nil)
	if err != nil {
		return err
	}
	// A connection of its own each time: a kept one would say nothing of whether
	// the component still accepts any.
	client := http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, Proxy: nil},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode >= 400 {
		return fmt.Errorf("GET %s: %s", check, resp.Status)
	}
	return nil
}

// probeGRPC asks grpc.health.v1 for service, "" for the server as a whole.
func probeGRPC(ctx context.Context, target, service string) error {
	conn, err := grpc.NewClient("passthrough:///"+target, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer conn.Close()
	resp, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{Service: service})
	if err != nil {
		return err
	}
	if resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("grpc health of %s is %s", target, resp.GetStatus())
	}
	return nil
}

// probeExec passes if the command ends with 0. It leads a process group, which is
// killed when its time is up, and of which nothing is left when it has ended.
func probeExec(ctx context.Context, argv []string, ch *child) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = ch.cmd.Env, ch.cmd.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ch.cgroup.hold(cmd.SysProcAttr)
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := ch.reaper.start(cmd); err != nil {
		return err
	}
	ch.guard.lead(cmd.Process.Pid)
	awaitExit(cmd.Process.Pid)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	err := ch.reaper.wait(cmd)
	ch.guard.leave(cmd.Process.Pid)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// verdict is what the checks of a component come to after one more of them.
type verdict struct {
	child   *child // the process that was checked
	id      string
	failing string // "" for a pass
}

// watch probes the component c while its process ch runs, until ctx ends: at growing
// steps at first, so that its start waits for no interval, and then at its interval.
// It sends a verdict for each pass, and for each failure from the health_retries-th
// in a row on. Failures at the steps, when it may not listen yet, do not count.
func watch(ctx context.Context, c *Component, ch *child, verdicts chan<- verdict) {
	const firstStep = 20 * time.Millisecond
	failures, step := 0, min(firstStep, c.healthInterval())
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		v := verdict{child: ch, id: c.ID}
		err := probeOnce(ctx, c, ch)
		switch {
		case err == nil:
			failures, step = 0, c.healthInterval()
		case step < c.healthInterval():
			step = min(2*step, c.healthInterval())
		default:
			failures++
			v.failing = fmt.Sprintf("health_check %s failed %d times running: %v", c.HealthCheck, failures, err)
		}
		if err == nil || failures >= c.healthRetries() {
			select {
			case verdicts <- v:
			case <-ctx.Done():
				return
			}
		}
		timer.Reset(step)
	}
}

func probeOnce(ctx context.Context, c *Component, ch *child) error {
	ctx, cancel := context.WithTimeout(ctx, c.healthTimeout())
	defer cancel()
	err := probe(ctx, c.HealthCheck, ch)
	if errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded {
		return fmt.Errorf("no answer within %s", c.healthTimeout())
	}
	return err
}
