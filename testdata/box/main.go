// Box is the one program of the image that the tests of containers run: it says on
// its output where it has come to, and then lives until it is asked to end.
package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	flowctlpb "github.com/withobsrvr/flowctl/proto/flowctl"
)

func main() {
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "box:", err)
		os.Exit(1)
	}
}

func run(what string, args []string) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGUSR1)
	switch what {
	case "live":
	case "deaf":
		signal.Stop(signals)
		signal.Ignore(syscall.SIGTERM)
	case "exit":
		code, err := strconv.Atoi(args[0])
		if err == nil {
			os.Exit(code)
		}
		return err
	case "exists": // a health_check
		_, err := os.Stat(args[0])
		return err
	case "describe":
		folder, _ := os.Getwd()
		text, err := os.ReadFile(args[0])
		fmt.Printf("uid %d, folder %s, file %q, %v\n", os.Getuid(), folder, text, err)
		for _, entry := range os.Environ() {
			fmt.Printf("env %q\n", entry)
		}
	case "serve":
		go func() {
			fmt.Println(http.ListenAndServe("127.0.0.1:"+os.Getenv("HEALTH_PORT"), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
		}()
	case "register":
		if err := register(args); err != nil {
			return err
		}
	default:
		return fmt.Errorf("%s: it is none of what %s can do", what, filepath.Base(os.Args[0]))
	}
	fmt.Println("up", what)
	fmt.Println("got", <-signals)
	return nil
}

// register sends nothing that tells which component this is, or the id that args name.
func register(args []string) error {
	conn, err := grpc.NewClient(os.Getenv("FLOWCTL_ENDPOINT"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ack, err := flowctlpb.NewControlPlaneClient(conn).Register(ctx, &flowctlpb.ServiceInfo{ServiceId: strings.Join(args, "")})
	if err == nil && ack.GetServiceId() != os.Getenv("FLOWCTL_COMPONENT_ID") {
		err = fmt.Errorf("taken for %q", ack.GetServiceId())
	}
	return err
}
