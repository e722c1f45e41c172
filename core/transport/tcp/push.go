// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// push is one operation of ours that the peer's engine carries out: it pulls the bytes, and answers.
type push struct {
	id   uint64
	lane *lane
	over chan struct{} // closed when the peer has answered or the session has ended

	// Guarded by session.mu until over is closed.
	err      error // the result
	answered bool  // it is the peer's word
	unsure   bool  // its caller has returned before the answer
}

// confirmation is what later operations wait for.
type confirmation struct {
	all  chan struct{} // closed when none is left
	left int           // pushes whose callers have returned before the answer; guarded by session.mu
}

// confirmWithin is how long a push that is to end waits for the peer to confirm that it has (rule 4 of docs/design.md).
const confirmWithin = time.Second

// Push implements transport.Session.
func (s *Session) Push(ctx context.Context, what *transport.Push) error {
	if err := transport.AwaitConfirmed(ctx, s); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return transport.Ended(ctx)
	}
	deadline, _ := ctx.Deadline()
	p, err := s.startPush(deadline, what)
	if err != nil {
		return err
	}
	select {
	case <-p.over:
		return p.err
	case <-ctx.Done():
		return s.endPush(ctx, p)
	}
}

// startPush registers the operation and sends its request.
func (s *Session) startPush(deadline time.Time, what *transport.Push) (*push, error) {
	length := pushBodyBytes(what)
	if err := checkBody(length); err != nil {
		return nil, err
	}
	p := &push{id: s.next.Add(1), over: make(chan struct{})}
	p.lane = s.freeLane(s.lanes[p.id%uint64(len(s.lanes))])
	f, body, err := s.newFrame(header{kind: kindPush, length: uint32(length), operation: p.id, a: requestMillis(deadline)})
	if err != nil {
		return nil, err
	}
	putPush(body, what)
	s.mu.Lock()
	if cause := s.cause; cause != nil {
		s.mu.Unlock()
		s.putBuffer(f.buffer)
		return nil, linkEnded(cause)
	}
	s.pushes[p.id] = p
	s.mu.Unlock()
	s.open.Add(1)
	p.lane.enqueue(f)
	return p, nil
}

// endPush ends a push whose ctx has ended.
func (s *Session) endPush(ctx context.Context, p *push) error {
	if p.lane.withdraw(p.id) {
		s.pushOver(p.id, transport.Ended(ctx), false)
		<-p.over
		return p.err
	}
	s.tell(p.lane, header{kind: kindCancel, operation: p.id})
	timer := time.NewTimer(confirmWithin)
	defer timer.Stop()
	select {
	case <-p.over:
	case <-timer.C:
		if s.leaveUnconfirmed(p) {
			return status.New(status.Timeout, status.StageTransfer, "receiver has not confirmed").
				Hinting("the destination may still change until the receiver answers; later transfers to it wait for that")
		}
	}
	if p.err != nil && p.answered {
		return transport.Ended(ctx) // the peer only says that it was told so
	}
	return p.err
}

// leaveUnconfirmed has later operations wait for the answer. It returns false where that has come.
func (s *Session) leaveUnconfirmed(p *push) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pushes[p.id] != p {
		return false
	}
	p.unsure = true
	c := s.unconfirmed.Load()
	if c == nil {
		c = &confirmation{all: make(chan struct{})}
		s.unconfirmed.Store(c)
	}
	c.left++
	return true
}

// Unconfirmed implements transport.Control.
func (s *Session) Unconfirmed() <-chan struct{} {
	if c := s.unconfirmed.Load(); c != nil {
		return c.all
	}
	return nil
}

// pushOver ends a push of ours, once, and reports that there was one.
func (s *Session) pushOver(id uint64, result error, answered bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pushes[id]
	if p == nil {
		return false
	}
	delete(s.pushes, id)
	p.err, p.answered = result, answered
	close(p.over)
	if c := s.unconfirmed.Load(); p.unsure {
		if c.left--; c.left == 0 {
			s.unconfirmed.Store(nil)
			close(c.all)
		}
	}
	s.open.Add(-1)
	s.wakeIdle()
	return true
}

// receiverSays marks what is the other end's view in an error: there "local" is what is remote here.
func receiverSays(e *status.Error) *status.Error {
	e.Cause = "receiver: " + e.Cause
	return e
}
