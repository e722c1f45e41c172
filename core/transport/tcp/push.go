// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// confirmWithin is how long a push that is to end waits for the peer to confirm that it has (rule 4 of docs/design.md).
const confirmWithin = time.Second

// confirmation is what later operations wait for.
type confirmation struct {
	all  chan struct{} // closed when none is left
	left int           // pushes whose callers have returned before the answer; guarded by session.mu
}

// Push implements transport.Session. A push is waited for as a pull is, but no bytes come for it: the peer's engine pulls, and answers.
func (s *Session) Push(ctx context.Context, what *transport.Push) error {
	if err := transport.AwaitConfirmed(ctx, s); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return transport.Ended(ctx)
	}
	deadline, bounded := ctx.Deadline()
	p, err := s.startPush(deadline, what)
	if err != nil {
		return err
	}
	if !bounded {
		deadline = time.Now().Add(forever)
	}
	for !p.await(ctx, deadline) {
		if ctx.Err() != nil {
			return s.endPush(ctx, p)
		}
		<-ctx.Done() // the timer was a little earlier
	}
	defer s.forget(p, p.id)
	return p.err
}

// startPush registers the operation and sends its request.
func (s *Session) startPush(deadline time.Time, what *transport.Push) (*pull, error) {
	length := pushBodyBytes(what)
	if err := checkBody(length); err != nil {
		return nil, err
	}
	p := s.newPull()
	p.push, p.led, p.lane = true, true, s.freeLane(p.lane)
	f, body, err := s.newFrame(header{kind: kindPush, length: uint32(length), operation: p.id, a: requestMillis(deadline)})
	if err != nil {
		return nil, err
	}
	putPush(body, what)
	return p, s.list(p, f)
}

// endPush ends a push whose ctx has ended.
func (s *Session) endPush(ctx context.Context, p *pull) error {
	if p.lane.withdraw(p.id) {
		p.end(transport.Ended(ctx))
	} else {
		s.tell(p.lane, header{kind: kindCancel, operation: p.id})
	}
	if !p.await(context.Background(), time.Now().Add(confirmWithin)) && s.leaveUnconfirmed(p) {
		return status.New(status.Timeout, status.StageTransfer, "receiver has not confirmed").
			Hinting("the destination may still change until the receiver answers; later transfers to it wait for that")
	}
	defer s.forget(p, p.id)
	if p.err != nil && p.told {
		return transport.Ended(ctx) // the peer only says that it was told so
	}
	return p.err
}

// leaveUnconfirmed has later operations wait for the answer. Where the session is ending it waits itself, and returns false.
func (s *Session) leaveUnconfirmed(p *pull) bool {
	s.mu.Lock()
	ending := s.cause != nil
	if !ending {
		s.awaitAnswer(p)
	}
	s.mu.Unlock()
	if ending {
		<-p.left // who has ended the session ends all its operations now
	}
	return !ending
}

// awaitAnswer waits for the answer to a push in its caller's place. The caller holds mu, and the session has not ended: it waits for this
// goroutine as for its lanes'.
func (s *Session) awaitAnswer(p *pull) {
	c := s.unconfirmed.Load()
	if c == nil {
		c = &confirmation{all: make(chan struct{})}
		s.unconfirmed.Store(c)
	}
	c.left++
	s.workers.Go(func() {
		<-p.left
		s.forget(p, p.id)
		s.confirmedLate(c)
	})
}

func (s *Session) confirmedLate(c *confirmation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.left--; c.left == 0 {
		s.unconfirmed.Store(nil)
		close(c.all)
	}
}

// Unconfirmed implements transport.Control.
func (s *Session) Unconfirmed() <-chan struct{} {
	if c := s.unconfirmed.Load(); c != nil {
		return c.all
	}
	return nil
}

// receiverSays marks what is the other end's view in an error: there "local" is what is remote here.
func receiverSays(e *status.Error) *status.Error {
	e.Cause = "receiver: " + e.Cause
	return e
}
