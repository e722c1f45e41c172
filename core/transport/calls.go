// SPDX-License-Identifier: Apache-2.0

package transport

import (
	"context"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Calls counts the pulls under way of a session that has a Control beside it, and ends with the session.
type Calls struct {
	life    context.Context // ends with Close, because of its cause
	end     context.CancelCauseFunc
	waiters sync.WaitGroup // goroutines of Idle

	mu    sync.Mutex // guards what follows
	pulls int
	quiet chan struct{} // closed when pulls becomes 0; nil: nobody waits
}

// NewCalls returns the calls of a session that works.
func NewCalls() *Calls {
	c := new(Calls)
	c.life, c.end = context.WithCancelCause(context.Background())
	return c
}

// Enter begins a pull, unless the session has ended: NotYetLink.
func (c *Calls) Enter() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		return status.Newf(status.NotYetLink, status.StageResolve, "the link has ended: %w", context.Cause(c.life))
	}
	c.pulls++
	return nil
}

// Leave ends what Enter began.
func (c *Calls) Leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pulls--; c.pulls == 0 && c.quiet != nil {
		close(c.quiet)
		c.quiet = nil
	}
}

// Within returns a context that ends with ctx and with the session. The caller calls what comes with it.
func (c *Calls) Within(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(c.life, func() { cancel(context.Cause(c.life)) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// Close is that of a Session: it ends all calls with cause, and control, and returns when no call is under way.
func (c *Calls) Close(cause error, control Control) {
	c.end(cause)
	control.Close(cause)
	<-c.silence() // and it stays so: nobody enters any more
	c.waiters.Wait()
}

// Idle is that of a Session.
func (c *Calls) Idle(control Control) <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.life.Err() != nil {
		return atOnce
	}
	if c.pulls == 0 {
		return control.Idle()
	}
	idle := make(chan struct{})
	c.waiters.Go(func() {
		defer close(idle)
		c.waitIdle(control)
	})
	return idle
}

// waitIdle returns when neither we nor the peer have anything under way, or the session ends.
func (c *Calls) waitIdle(control Control) {
	for {
		select {
		case <-c.silence():
		case <-c.life.Done():
			return
		}
		select {
		case <-control.Idle():
		case <-c.life.Done():
			return
		}
		c.mu.Lock()
		still := c.pulls == 0
		c.mu.Unlock()
		if still {
			return
		}
	}
}

// atOnce is a channel that has been closed.
var atOnce = func() chan struct{} { c := make(chan struct{}); close(c); return c }()

// silence returns a channel that is closed as soon as no pull is under way.
func (c *Calls) silence() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.pulls == 0 {
		return atOnce
	}
	if c.quiet == nil {
		c.quiet = make(chan struct{})
	}
	return c.quiet
}
