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
// health_interval is shorter. It doubles until a check passes: the start waits for no interval.
const firstCheckWait = 20 * time.Millisecond

// checks makes the health checks of the components that run, each in a goroutine of its own.
// Its methods are called from one goroutine, which also takes what comes from results.
type checks struct {
	results chan checkResult
	ownerOf func(pid int) (id string, known bool, err error) // the component that a process belongs to
	log     *slog.Logger
	cancels map[string]context.CancelFunc // by component
	running sync.WaitGroup
}

// checkResult is what the checks of a component come to after one more of them.
type checkResult struct {
	child   *child // the process that was checked
	failing string // why it is not well; "" for a pass
}

func newChecks(ownerOf func(pid int) (id string, known bool, err error), log *slog.Logger) *checks {
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

// stop ends the checks of a component, if there are any. The result of one may still come.
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
	for wait := time.Duration(0); ; wait = step {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
		result := checkResult{child: ch}
		err := probe(ctx, c, ch)
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
			}
		}
		if ch.endBeside(ctx); ctx.Err() != nil {
			return
		}
		if passed && c.readyOnceRunning() {
			return
		}
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
	if id, known, err := s.ownerOf(pid); err == nil && known && id != c.ID {
		s.log.Warn("health_check passes, but what listens there is not of this component", "component", c.ID, "addr", u.Host, "pid", pid, "name", clean(name))
	}
}

// describeFailing says which check failed and how often in a row, 0 for failures that do not count.
// Once c is unhealthy it stays the same.
func describeFailing(c *Component, ch *child, failures int) string {
	failures = min(failures, c.healthRetries())
	often := fmt.Sprintf("failed %d times running", failures)
	switch {
	case c.readyOnceRunning():
		return "its container does not run yet"
	case failures == 0:
		often = "has not passed yet"
	case failures == 1:
		often = "failed"
	}
	return fmt.Sprintf("health_check %s %s", shownCheck(ch.fill(c.HealthCheck)), often)
}

// shownCheck returns a check as everybody may see it: without arguments, passwords and the values of
// a query.
func shownCheck(check string) string {
	if line, ok := strings.CutPrefix(check, "exec:"); ok {
		argv, _ := words(line) // checkHealth has found it right
		if len(argv) > 1 {
			return "exec:" + argv[0] + " ***"
		}
		return check
	}
	u, err := url.Parse(check)
	if err != nil {
		return "***"
	}
	shown := u.Scheme + "://"
	if _, hasPassword := u.User.Password(); hasPassword {
		shown += url.User(u.User.Username()).String() + ":***@"
	} else if u.User != nil {
		shown += "***@"
	}
	shown += u.Host + u.EscapedPath()
	if u.RawQuery != "" {
		shown += "?" + queryFields().ReplaceAllString(u.RawQuery, "$1$2***")
	}
	return shown
}

var queryFields = pattern(`(^|&)([^=&]*=)?[^&]*`) // one without a name may be a token itself

// probe makes one check of c, within its health_timeout. It fails if the check does not pass.
func probe(ctx context.Context, c *Component, ch *child) (err error) {
	ctx, cancel := context.WithTimeout(ctx, c.healthTimeout())
	defer cancel()
	u, parseErr := url.Parse(ch.fill(c.HealthCheck))
	switch {
	case c.readyOnceRunning():
		err = ch.container.checkRuns(ctx)
	case len(c.HealthCommand) > 0:
		err = probeExec(ctx, c.HealthCommand, ch)
	case parseErr != nil:
		err = parseErr.(*url.Error).Err // which does not show it
	case u.Scheme == "tcp":
		var conn net.Conn
		if conn, err = new(net.Dialer).DialContext(ctx, "tcp", u.Host); err == nil {
			conn.Close()
		}
	case u.Scheme == "grpc":
		err = probeGRPC(ctx, u.Host, strings.TrimPrefix(u.Path, "/"))
	default: // http or https
		err = probeHTTP(ctx, u)
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer within %s", c.healthTimeout())
	}
	return err
}

// fill replaces $HEALTH_PORT by its value.
func (c *child) fill(check string) string {
	return healthPortName().ReplaceAllLiteralString(check, c.healthPort)
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
	if named, ok := errors.AsType[*url.Error](err); ok {
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

// probeExec passes if the command ends with 0, else it fails with the command's last line.
func probeExec(ctx context.Context, command []string, ch *child) error {
	var argv []string
	for _, arg := range command {
		argv = append(argv, ch.fill(arg))
	}
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
