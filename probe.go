// Health checks: how each kind of health_check asks, and the goroutines that ask again and again.

package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// firstCheckWait is the time from the first check of a component to the second, unless its
// health_interval is shorter. It doubles with each check until one passes, so that the start of
// a pipeline waits for no interval.
const firstCheckWait = 20 * time.Millisecond

// checks makes the health checks of the components that run, each in a goroutine of its own.
// Its methods are called from one goroutine, which also takes what comes from results.
type checks struct {
	results chan checkResult
	ownerOf func(pid int) (id string, known bool) // the component that a process belongs to
	log     *slog.Logger
	cancels map[string]context.CancelFunc // by component
	running sync.WaitGroup
}

// checkResult is what the checks of a component come to after one more of them.
type checkResult struct {
	child   *child // the process that was checked
	id      string
	failing string // why it is not well; "" for a pass
}

func newChecks(ownerOf func(pid int) (id string, known bool), log *slog.Logger) *checks {
	return &checks{results: make(chan checkResult), ownerOf: ownerOf, log: log, cancels: make(map[string]context.CancelFunc)}
}

// start checks c, whose process is ch, until stop. It replaces checks of a former process.
//
// The first checks come at growing steps, later ones at the component's interval. A result is
// sent for each pass, and for each failure from the health_retries-th in a row on. Failures at
// the steps do not count, because c may not listen yet. If c becomes ready only by a pass, they
// are sent all the same: they are the reason why it is not. A component that is ready once its
// container runs is not checked any more after its first pass.
func (s *checks) start(c *Component, ch *child) {
	s.stop(c.ID)
	ctx, cancel := context.WithCancel(context.Background())
	s.cancels[c.ID] = cancel
	s.running.Go(func() { s.run(ctx, c, ch) })
}

// stop ends the checks of a component, if there are any. It does not wait for one that is being
// made: a result may still come.
func (s *checks) stop(id string) {
	if cancel := s.cancels[id]; cancel != nil {
		cancel()
		delete(s.cancels, id)
	}
}

// close ends all checks and waits for them.
func (s *checks) close() {
	for id := range s.cancels {
		s.stop(id)
	}
	s.running.Wait()
}

// run makes the checks of c until ctx ends.
func (s *checks) run(ctx context.Context, c *Component, ch *child) {
	failures, step, passed := 0, min(firstCheckWait, c.healthInterval()), false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		result := checkResult{child: ch, id: c.ID}
		err := probeOnce(ctx, c, ch)
		switch {
		case err == nil:
			if !passed {
				s.warnIfForeign(c, ch)
			}
			failures, step, passed = 0, c.healthInterval(), true
		case step < c.healthInterval():
			step = min(2*step, c.healthInterval())
		default:
			failures++
		}
		if err != nil {
			result.failing = fmt.Sprintf("%s: %.200s", describeFailing(c, ch, failures), printable(err.Error()))
		}
		if err == nil || !passed && !c.registers() || failures >= c.healthRetries() {
			select {
			case s.results <- result:
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

// warnIfForeign warns if what listens at the address of c's check belongs to no process of c. The
// check passes all the same: c may use a server that somebody else runs.
func (s *checks) warnIfForeign(c *Component, ch *child) {
	u, err := url.Parse(ch.fill(c.HealthCheck))
	if err != nil || u.Hostname() != "localhost" && net.ParseIP(u.Hostname()) == nil {
		return
	}
	port, _ := strconv.Atoi(cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme]))
	pid, name, ok := portHolder(u.Hostname(), port)
	if !ok {
		return
	}
	if id, known := s.ownerOf(pid); known && id != c.ID {
		s.log.Warn("health_check passes, but what listens there is not of this component", "component", c.ID, "addr", u.Host, "pid", pid, "name", clean(name))
	}
}

// describeFailing says which check failed and how often, as the beginning of a reason.
func describeFailing(c *Component, ch *child, failures int) string {
	if c.readyOnceRunning() {
		return "its container does not run yet"
	}
	return fmt.Sprintf("health_check %s %s", withoutPassword(ch.fill(c.HealthCheck)), howOften(min(failures, c.healthRetries())))
}

// howOften says how often in a row a check has failed, up to the number that makes its
// component unhealthy: after that the cause stays the same. 0 is for failures that do not count.
func howOften(failures int) string {
	switch failures {
	case 0:
		return "has not passed yet"
	case 1:
		return "failed"
	}
	return fmt.Sprintf("failed %d times running", failures)
}

// withoutPassword returns a check as it may be shown.
func withoutPassword(check string) string {
	if u, err := url.Parse(check); err == nil && u.User != nil {
		return u.Redacted()
	}
	return check
}

// probeOnce is probe within the component's health_timeout.
func probeOnce(ctx context.Context, c *Component, ch *child) error {
	ctx, cancel := context.WithTimeout(ctx, c.healthTimeout())
	defer cancel()
	err := probe(ctx, c, ch)
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", c.healthTimeout())
	}
	return err
}

// probe makes one check of c, whose process is ch. It fails with the reason why the check does
// not pass. ctx bounds how long it takes.
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

// fill replaces $HEALTH_PORT by its value.
func (c *child) fill(check string) string {
	return healthPortName.ReplaceAllLiteralString(check, c.healthPort)
}

// probeHTTP passes on any 2xx or 3xx, as a load balancer would.
func probeHTTP(ctx context.Context, u *url.URL) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	// Each check makes a new connection, to find out whether the component still accepts any.
	// The certificate does not matter: it may be self-signed, or another host's.
	client := http.Client{
		Transport: &http.Transport{DisableKeepAlives: true, Proxy: nil,
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, MaxResponseHeaderBytes: 64 << 10},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if named := (*url.Error)(nil); errors.As(err, &named) {
		return named.Err // the caller names the URL
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

// probeExec passes if the command ends with 0. Else it fails with the last line that the
// command printed.
func probeExec(ctx context.Context, argv []string, ch *child) error {
	exit, lines, err := ch.run(ctx, argv)
	switch {
	case err != nil:
		return err
	case exit == 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case len(lines) > 0:
		return fmt.Errorf("%s: %s", describeExit(exit), lines[len(lines)-1])
	}
	return errors.New(describeExit(exit))
}
