package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// probe asks once how c is by its health_check. It fails with the reason why that did
// not pass; ctx bounds how long it takes. An exec: check runs in the folder and the
// environment of c's process ch, or in its container.
func probe(ctx context.Context, c *Component, ch *child) error {
	if c.readyOnceRunning() {
		return ch.container.checkRuns(ctx)
	}
	if len(c.HealthCommand) > 0 {
		argv := slices.Clone(c.HealthCommand)
		for i := range argv {
			argv[i] = ch.fill(argv[i])
		}
		return probeExec(ctx, argv, ch)
	}
	u, err := url.Parse(ch.fill(c.HealthCheck))
	if err != nil {
		return err
	}
	switch u.Scheme {
	case "http", "https":
		return probeHTTP(ctx, u)
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

// fill puts in for $HEALTH_PORT what that is.
func (c *child) fill(check string) string {
	return healthPortName.ReplaceAllLiteralString(check, c.healthPort)
}

// probeHTTP passes on any 2xx or 3xx, as a load balancer would.
func probeHTTP(ctx context.Context, u *url.URL) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	// A connection of its own each time: a kept one would say nothing of whether
	// the component still accepts any. Whether it answers is asked, and not who it is:
	// its certificate may be self-signed, or another host's.
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if named := (*url.Error)(nil); errors.As(err, &named) {
		return named.Err // without the URL, which the caller names
	} else if err != nil {
		return err
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	if resp.StatusCode >= 400 {
		return errors.New("HTTP status " + resp.Status)
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
	switch answer := status.Convert(err); answer.Code() {
	case codes.OK:
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	default:
		return fmt.Errorf("%s: %s", answer.Code(), answer.Message())
	}
	if resp.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		return fmt.Errorf("its status is %s", resp.GetStatus())
	}
	return nil
}

// probeExec passes if the command ends with 0, and else fails with the last line that
// it printed. It leads a process group, which is killed when its time is up, and of
// which nothing is left when it has ended.
func probeExec(ctx context.Context, argv []string, ch *child) error {
	argv = ch.container.inside(argv)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env, cmd.Dir = ch.cmd.Env, ch.cmd.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	ch.cgroup.hold(cmd.SysProcAttr)
	var printed tail
	cmd.Stdout, cmd.Stderr = &printed, &printed
	cmd.WaitDelay = outputGrace // where what has left the group holds its output
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := ch.reaper.start(cmd); err != nil {
		return fmt.Errorf("cannot run %q: %v", argv[0], cause(err))
	}
	ch.guard.lead(cmd.Process.Pid)
	awaitExit(cmd.Process.Pid)
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	_ = ch.reaper.wait(cmd) // how it ended is in its state
	ch.guard.leave(cmd.Process.Pid)
	lines := printed.lines()
	switch {
	case cmd.ProcessState.Success():
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case len(lines) > 0:
		return fmt.Errorf("%s: %s", describeExit(cmd.ProcessState), lines[len(lines)-1])
	}
	return errors.New(describeExit(cmd.ProcessState))
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
// in a row on. Failures at the steps, when it may not listen yet, do not count; where
// it is ready only by a pass they are sent too, as the reason why it is not. Of what is
// ready once it runs the first pass is the last: from then on its process stands for it.
func watch(ctx context.Context, s *supervisor, c *Component, ch *child, verdicts chan<- verdict) {
	const firstStep = 20 * time.Millisecond
	failures, step, passed := 0, min(firstStep, c.healthInterval()), false
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
			if !passed {
				s.warnOfStranger(c, ch)
			}
			failures, step, passed = 0, c.healthInterval(), true
		case step < c.healthInterval():
			step = min(2*step, c.healthInterval())
		default:
			failures++
		}
		if err != nil {
			v.failing = fmt.Sprintf("%s: %.200s", describeFailing(c, ch, failures), printable(err.Error()))
		}
		if err == nil || !passed && !c.registers() || failures >= c.healthRetries() {
			select {
			case verdicts <- v:
			case <-ctx.Done():
				return
			}
		}
		if passed && c.readyOnceRunning() {
			return
		}
		timer.Reset(step)
	}
}

// warnOfStranger tells of a check that another program passes, which has the port and
// says nothing of c. It stays a pass: what is asked may be meant to be elsewhere.
func (s *supervisor) warnOfStranger(c *Component, ch *child) {
	u, err := url.Parse(ch.fill(c.HealthCheck))
	if err != nil || u.Hostname() != "localhost" && net.ParseIP(u.Hostname()) == nil {
		return
	}
	port, _ := strconv.Atoi(cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme]))
	pid, name, ok := portHolder(u.Hostname(), port)
	if !ok {
		return
	}
	if id, known := s.componentOf(pid); known && id != c.ID {
		s.log.Warn("health_check passes, but what listens there is not of this component", "component", c.ID, "addr", u.Host, "pid", pid, "name", clean(name))
	}
}

func describeFailing(c *Component, ch *child, failures int) string {
	if c.readyOnceRunning() {
		return "its container does not run yet"
	}
	return fmt.Sprintf("health_check %s %s", withoutPassword(ch.fill(c.HealthCheck)), howOften(failures))
}

// howOften says how often in a row a check has failed, 0 for a start.
func howOften(failures int) string {
	switch failures {
	case 0:
		return "has not passed yet"
	case 1:
		return "failed"
	}
	return fmt.Sprintf("failed %d times running", failures)
}

func probeOnce(ctx context.Context, c *Component, ch *child) error {
	ctx, cancel := context.WithTimeout(ctx, c.healthTimeout())
	defer cancel()
	err := probe(ctx, c, ch)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", c.healthTimeout())
	}
	return err
}

// withoutPassword is check as it may be shown.
func withoutPassword(check string) string {
	if u, err := url.Parse(check); err == nil && u.User != nil {
		return u.Redacted()
	}
	return check
}
