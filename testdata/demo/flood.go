package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"strconv"
	"time"

	"google.golang.org/grpc"

	flowctlv1 "github.com/withobsrvr/flowctl/proto/flowctl/v1"
)

// The roles of this file are the load of a benchmark: as many events as EVENTS
// says, of EVENT_BYTES each. ../flood.json runs them.

const floodType = "flood"

type flooder struct {
	passive
	events, size int
}

func flood(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo flood", flag.ExitOnError), args)
	s := &flooder{}
	var err error
	if s.events, err = envNumber("EVENTS"); err != nil {
		return err
	}
	if s.size, err = envNumber("EVENT_BYTES"); err != nil {
		return err
	}
	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_SOURCE,
		OutputEventTypes: []string{floodType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterSourceServiceServer(server, s) })
}

func envNumber(name string) (int, error) {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil || n < 0 {
		return 0, fmt.Errorf("%s is %q, not a number", name, os.Getenv(name))
	}
	return n, nil
}

func (s *flooder) StreamEvents(_ *flowctlv1.StreamRequest, stream grpc.ServerStreamingServer[flowctlv1.Event]) error {
	payload := bytes.Repeat([]byte("x"), s.size)
	for i := range s.events {
		event := &flowctlv1.Event{Id: strconv.Itoa(i + 1), Type: floodType, Payload: payload, SourceComponentId: s.info.Id}
		if err := s.send(stream, event); err != nil {
			return err
		}
	}
	return nil
}

// passer sends on what it gets.
type passer struct{ passive }

func pass(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo pass", flag.ExitOnError), args)
	s := &passer{}
	info := &flowctlv1.ComponentInfo{
		Type:             flowctlv1.ComponentType_COMPONENT_TYPE_PROCESSOR,
		InputEventTypes:  []string{floodType},
		OutputEventTypes: []string{floodType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterProcessorServiceServer(server, s) })
}

func (s *passer) Process(stream grpc.BidiStreamingServer[flowctlv1.Event, flowctlv1.Event]) error {
	return s.each(stream, stream.Send)
}

// counter says how many events have come, and in which time.
type counter struct{ passive }

func count(stop context.Context, args []string) error {
	parse(flag.NewFlagSet("demo count", flag.ExitOnError), args)
	s := &counter{}
	info := &flowctlv1.ComponentInfo{
		Type:            flowctlv1.ComponentType_COMPONENT_TYPE_CONSUMER,
		InputEventTypes: []string{floodType},
	}
	return s.serve(stop, info, func(server *grpc.Server) { flowctlv1.RegisterConsumerServiceServer(server, s) })
}

func (s *counter) Consume(stream grpc.ClientStreamingServer[flowctlv1.Event, flowctlv1.ConsumeResponse]) error {
	first, response := time.Now(), &flowctlv1.ConsumeResponse{}
	err := s.each(stream, func(*flowctlv1.Event) error {
		if response.EventsConsumed == 0 {
			first = time.Now()
		}
		response.EventsConsumed++
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Printf("%d events in %.3f s\n", response.EventsConsumed, time.Since(first).Seconds())
	return stream.SendAndClose(response)
}
