// SPDX-License-Identifier: Apache-2.0

// Package backend puts engines together from what is there and keeps them for Python behind integers.
//
// It is the one package that may import both core and capi. Python knows an engine by a handle, a long call by a number that Python
// draws itself, and a failure by the negative of the number under which it can be fetched once. All tables are empty when everything
// has ended; tests look.
package backend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/engine"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// firstNumber keeps the numbers that are drawn here, for failures of short calls, apart from those that Python draws for engines and
// operations, which count up from 1.
const firstNumber = 1 << 50

// mostFailures bounds the failures that nobody has fetched: a signal may take a result away between the call and its assignment.
const mostFailures = 1024

var state = struct {
	mu         sync.Mutex // guards all of it
	next       int64
	engines    map[int64]*engine.Engine
	timeouts   map[int64]time.Duration // llm.SyncKvCacheWaitTime of each engine
	operations map[int64]*operation
	failures   map[int64]*status.Error
	order      []int64 // keys of failures, oldest first
	texts      map[int64]string
}{
	next: firstNumber, engines: map[int64]*engine.Engine{}, timeouts: map[int64]time.Duration{}, operations: map[int64]*operation{},
	failures: map[int64]*status.Error{}, texts: map[int64]string{},
}

// operation is a long call that is under way.
type operation struct {
	cancel    context.CancelCauseFunc
	cancelled bool // nobody takes its result; guarded by state.mu
	done      chan struct{}
	text      string
	err       error
}

// errCancelled is the cause of an operation that Python has cancelled.
var errCancelled = errors.New("cancelled by the caller")

// spareThreads is how many goroutines may run beside those that wait in a system call: a call that blocks keeps its place in the
// scheduler for up to some milliseconds, so that with as many places as cores a woken goroutine would wait for that.
const spareThreads = 6

var widen = sync.OnceFunc(func() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(runtime.NumCPU() + spareThreads)
	}
})

// Open makes an engine from the id, the options and the environment, both JSON objects of strings, under the handle that Python drew.
// The environment is Python's: Go sees only what was set before the process started.
func Open(handle int64, clusterID uint64, options, environment string) error {
	var texts, variables map[string]string
	if err := errors.Join(json.Unmarshal([]byte(options), &texts), json.Unmarshal([]byte(environment), &variables)); err != nil {
		return status.Newf(status.ParamInvalid, status.StageCheck, "the options are not strings: %w", err)
	}
	parsed, err := engine.ParseOptions(texts, func(name string) (string, bool) {
		value, ok := variables[name]
		return value, ok
	})
	if err != nil {
		return err
	}
	widen()
	report := post
	if parsed.MultipleEngines {
		report = func(e link.Event) { postOf(&clusterID, e) }
	}
	on, err := choose(parsed)
	if err != nil {
		return err
	}
	made, err := engine.New(clusterID, parsed, engine.Parts{Device: on.device, Network: engine.TCP(), Library: on.library, Event: report})
	if err != nil {
		return err
	}
	report(link.Event{Level: link.Info, Text: on.why})
	state.mu.Lock()
	defer state.mu.Unlock()
	state.engines[handle] = made
	state.timeouts[handle] = parsed.SyncTimeout
	return nil
}

// Engine returns the engine of a handle, or ParamInvalid: the documented answer to calls after finalize.
func Engine(handle int64) (*engine.Engine, error) {
	e, _, err := engineOf(handle)
	return e, err
}

// engineOf returns the engine of a handle and its deadline for transfers.
func engineOf(handle int64) (*engine.Engine, time.Duration, error) {
	state.mu.Lock()
	defer state.mu.Unlock()
	if e, ok := state.engines[handle]; ok {
		return e, state.timeouts[handle], nil
	}
	return nil, 0, status.New(status.ParamInvalid, status.StageCheck, "the engine was finalized").Hinting("call init again")
}

// Timeout returns an engine's deadline for transfers.
func Timeout(handle int64) time.Duration {
	_, timeout, err := engineOf(handle)
	if err != nil {
		return 0 // the call that follows says so
	}
	return timeout
}

// Close finalizes the engine of a handle. An unknown one is fine. Calls that are under way end first, in failure.
func Close(handle int64) error {
	state.mu.Lock()
	e := state.engines[handle]
	delete(state.engines, handle)
	delete(state.timeouts, handle)
	state.mu.Unlock()
	if e == nil {
		return nil
	}
	return e.Close()
}

// Start runs a long call under the number that Python drew, waits for at most wait, and returns 1 where it is still running, 0 where it
// has succeeded, or minus the number under which its failure lies: its own. timeout 0 is no deadline.
func Start(number int64, wait, timeout time.Duration, run func(ctx context.Context) (string, error)) int64 {
	ctx, cancel := context.WithCancelCause(context.Background())
	stop := func() {}
	if timeout > 0 {
		ctx, stop = context.WithTimeout(ctx, timeout)
	}
	op := &operation{cancel: cancel, done: make(chan struct{})}
	state.mu.Lock()
	state.operations[number] = op
	state.mu.Unlock()
	go func() {
		defer finish(number, op)
		defer cancel(nil)
		defer stop()
		defer func() {
			if r := recover(); r != nil {
				op.err = Panicked(r)
			}
		}()
		op.text, op.err = run(ctx)
	}()
	return Wait(number, wait)
}

// calls recycles what a pull is described with.
var calls = sync.Pool{New: func() any { return new(engine.PullCall) }}

// NewPull returns a description to fill in for StartPull. What its block lists had room for is there to be used again.
func NewPull() *engine.PullCall { return calls.Get().(*engine.PullCall) }

// keepBlocks bounds what is kept of block lists: 512 KiB each.
const keepBlocks = 1 << 16

// EndPull takes a description back.
func EndPull(call *engine.PullCall) {
	if cap(call.Plan.SrcBlocks) <= keepBlocks && cap(call.Plan.DstBlocks) <= keepBlocks {
		calls.Put(call)
	}
}

// StartPull starts a pull as Start does, and takes call over. Most pulls end within the first wait: they are made on the calling thread
// itself, since handing them to another one and back costs as much as a small transfer.
func StartPull(number, handle int64, wait time.Duration, call *engine.PullCall) (result int64) {
	var started *engine.Pulling // while it is ours to finish
	defer func() {
		if r := recover(); r != nil {
			result = Fail(number, Panicked(r))
			giveUp(started)
		}
	}()
	e, timeout, err := engineOf(handle)
	if err != nil {
		return Fail(number, err)
	}
	began := time.Now()
	deadline := began.Add(timeout)
	p, err := e.BeginPull(deadline, call)
	if err != nil {
		return Fail(number, err)
	}
	started = p
	if p.Advance(min(wait, timeout)) {
		started = nil
		err := p.Finish(context.Background())
		EndPull(call)
		if err != nil {
			return Fail(number, err)
		}
		return 0
	}
	started = nil
	const past = 1 // a deadline that has passed is one still
	left := max(0, wait-time.Since(began))
	return Start(number, left, max(past, time.Until(deadline)), func(ctx context.Context) (string, error) {
		err := p.Finish(ctx)
		EndPull(call)
		return "", err
	})
}

// giveUp ends a pull in which the engine has panicked, so that what it holds is let go of. What else goes wrong there is in the log.
func giveUp(p *engine.Pulling) {
	if p == nil {
		return
	}
	defer func() {
		if r := recover(); r != nil {
			_ = Panicked(r)
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_ = p.Finish(ctx) // the panic is what the caller hears of
}

// finish says that an operation has ended. Where it was cancelled it is forgotten, since whoever cancelled it may have been interrupted
// in waiting for that.
func finish(number int64, op *operation) {
	state.mu.Lock()
	defer state.mu.Unlock()
	if op.cancelled {
		delete(state.operations, number)
	}
	close(op.done)
}

// Panicked turns a panic into an error, so that none crosses the boundary.
func Panicked(r any) error {
	post(link.Event{Level: link.Error, Text: fmt.Sprintf("panic: %v\n%s", r, debug.Stack())})
	return status.Newf(status.Failed, status.StageCheck, "the engine has a defect: %v", r).Hinting("report it with the log")
}

// Wait waits for an operation for at most wait and returns as Start does. Where it has ended, the number is free again.
func Wait(number int64, wait time.Duration) int64 {
	state.mu.Lock()
	op := state.operations[number]
	state.mu.Unlock()
	if op == nil {
		return Fail(number, status.New(status.ParamInvalid, status.StageCheck, "there is no such operation"))
	}
	if !closed(op.done, wait) {
		return 1
	}
	state.mu.Lock()
	delete(state.operations, number)
	if op.text != "" {
		state.texts[number] = op.text
	}
	state.mu.Unlock()
	if op.err != nil {
		return Fail(number, op.err)
	}
	return 0
}

// closed waits until done is closed, for at most wait. What is closed already is seen, however short the wait: finish leaves that to
// Cancel.
func closed(done <-chan struct{}, wait time.Duration) bool {
	select {
	case <-done:
		return true
	default:
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-timer.C:
		return false
	}
}

// Cancel ends an operation, known or not, waits for at most wait until it has let go, and returns 1 where it has not yet, else 0.
// Whatever lay under its number is gone then.
func Cancel(number int64, wait time.Duration) int64 {
	state.mu.Lock()
	op := state.operations[number]
	if op != nil {
		op.cancelled = true
	}
	state.mu.Unlock()
	if op != nil {
		op.cancel(errCancelled)
		if !closed(op.done, wait) {
			return 1
		}
	}
	state.mu.Lock()
	defer state.mu.Unlock()
	delete(state.operations, number)
	delete(state.failures, number)
	delete(state.texts, number)
	return 0
}

// Fail keeps a failure until it is fetched and returns minus its number. number 0 draws one.
func Fail(number int64, err error) int64 {
	state.mu.Lock()
	defer state.mu.Unlock()
	if number == 0 {
		state.next++
		number = state.next
	}
	state.failures[number] = status.From(err, status.StageCheck)
	state.order = append(state.order, number)
	if len(state.order) > mostFailures {
		delete(state.failures, state.order[0])
		state.order = state.order[1:]
	}
	return -number
}

// TakeFailure returns the failure of a number as JSON and forgets it; "" where there is none.
func TakeFailure(number int64) string {
	state.mu.Lock()
	e := state.failures[number]
	delete(state.failures, number)
	if len(state.failures) == 0 {
		state.order = nil
	}
	state.mu.Unlock()
	if e == nil {
		return ""
	}
	text, err := json.Marshal(e)
	if err != nil {
		return fmt.Sprintf(`{"code": %d, "text": %q}`, uint32(e.Code), e.Error())
	}
	return string(text)
}

// TakeText returns the text that an operation has left and forgets it.
func TakeText(number int64) string {
	state.mu.Lock()
	defer state.mu.Unlock()
	text := state.texts[number]
	delete(state.texts, number)
	return text
}

// Held counts what the tables hold: engines, operations, failures and texts. It is 0 when everything has ended.
func Held() int64 {
	state.mu.Lock()
	defer state.mu.Unlock()
	return int64(len(state.engines) + len(state.operations) + len(state.failures) + len(state.texts))
}
