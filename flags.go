package main

// Flags whose values are checked when they are set.

import (
	"errors"
	"flag"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
)

// flagValue is the value of a flag that is checked when it is set. It keeps the error for parseFlags:
// package flag would put the error into a sentence of its own.
type flagValue[T any] struct {
	value *T
	parse func(text string) (T, error) // its errors begin with "it must"
	err   error
}

// define defines a flag of fs that sets to; value is the default.
func define[T any](fs *flag.FlagSet, to *T, name string, value T, usage string, parse func(string) (T, error)) {
	*to = value
	fs.Var(&flagValue[T]{value: to, parse: parse}, name, usage)
}

func (o *flagValue[T]) String() string {
	if o.value == nil { // package flag may ask a zero value
		return ""
	}
	return fmt.Sprint(*o.value)
}

func (o *flagValue[T]) Set(text string) error {
	if value, err := o.parse(text); err != nil {
		o.err = fmt.Errorf("%q: %w", text, err)
	} else {
		*o.value = value
	}
	return nil
}

func (o *flagValue[T]) IsBoolFlag() bool {
	_, ok := any(*o.value).(bool)
	return ok
}

func (o *flagValue[T]) problem() error { return o.err }

// parseBytes parses a number of bytes that a message may have.
func parseBytes(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > math.MaxInt32 {
		return 0, fmt.Errorf("it must be a number of bytes from 1 to %d", math.MaxInt32)
	}
	return n, nil
}

func defineBool(fs *flag.FlagSet, to *bool, name string, value bool, usage string) {
	define(fs, to, name, value, usage, func(text string) (bool, error) {
		value, err := strconv.ParseBool(text)
		if err != nil {
			err = errors.New("it must be true or false")
		}
		return value, err
	})
}

func defineDuration(fs *flag.FlagSet, to *time.Duration, name string, value time.Duration, usage string) {
	const least = 10 * time.Millisecond
	define(fs, to, name, value, usage, func(text string) (time.Duration, error) {
		value, err := time.ParseDuration(text)
		switch {
		case err != nil:
			err = errors.New("it must be a time with a unit, such as 30s")
		case value < least:
			err = fmt.Errorf("it must be %s at least", least)
		}
		return value, err
	})
}

// defineChoice defines a flag that takes one of texts.
func defineChoice(fs *flag.FlagSet, to *string, name, value, usage string, texts ...string) {
	define(fs, to, name, value, usage, func(text string) (string, error) {
		if slices.Contains(texts, text) {
			return text, nil
		}
		last := len(texts) - 1
		return "", fmt.Errorf("it must be %s or %s", strings.Join(texts[:last], ", "), texts[last])
	})
}
