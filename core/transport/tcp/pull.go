// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// pull is one operation of ours. Its bytes are placed by the lanes, each of which enters it for one system call at a time; when it has
// ended nobody enters any more, and the caller waits until the last one has left.
type pull struct {
	id      uint64
	lane    *lane // carries the request and what follows it
	req     *transport.Request
	resolve bool // only the entry is wanted
	stream  *stream

	done  chan struct{} // closed when the operation has ended
	left  chan struct{} // closed when it has ended and no lane is inside
	acked chan status.Code

	planMu sync.Mutex // held while the plan is built, so that two entries build it once

	mu      sync.Mutex // guards what follows
	planned bool
	entry   entry
	placed  uint64 // bytes whose trailer was good
	inside  int    // lanes that are in a system call on our memory
	ended   bool
	told    bool // the owner knows that it has ended
	err     error
}

// enter lets a lane touch the operation's memory until exit. It returns false when the operation has ended.
func (p *pull) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return false
	}
	p.inside++
	return true
}

func (p *pull) exit() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inside--
	if p.ended && p.inside == 0 {
		close(p.left)
	}
}

// end ends the operation once, with its result. It never waits.
func (p *pull) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked(err)
}

func (p *pull) endLocked(err error) {
	if p.ended {
		return
	}
	p.ended, p.err = true, err
	close(p.done)
	if p.inside == 0 {
		close(p.left)
	}
}

// Pull copies what req names into local. See transport.Session.
func (s *Session) Pull(ctx context.Context, req *transport.Request, local transport.Local) error {
	if ctx.Err() != nil {
		return transport.Ended(ctx)
	}
	deadline, _ := ctx.Deadline()
	p, err := s.start(deadline, req, local, 0)
	if err != nil {
		return err
	}
	return underway{s, p}.Finish(ctx)
}

// Begin implements transport.Beginner.
func (s *Session) Begin(deadline time.Time, req *transport.Request, local transport.Local) (transport.Operation, error) {
	p, err := s.start(deadline, req, local, 0)
	if err != nil {
		return nil, err
	}
	return underway{s, p}, nil
}

// underway is a pull that was begun and not yet finished.
type underway struct {
	session *Session
	pull    *pull
}

// Done implements transport.Operation.
func (u underway) Done() <-chan struct{} { return u.pull.left }

// Quick implements transport.Operation.
func (u underway) Quick() bool {
	u.pull.mu.Lock()
	defer u.pull.mu.Unlock()
	return u.pull.err != nil || !u.pull.entry.consumes
}

// Finish implements transport.Operation.
func (u underway) Finish(ctx context.Context) error {
	defer u.session.forget(u.pull)
	if err := u.session.wait(ctx, u.pull); err != nil {
		return err
	}
	if u.pull.entry.consumes {
		return u.session.confirm(ctx, u.pull)
	}
	return nil
}

// start registers the operation and sends its request.
func (s *Session) start(deadline time.Time, req *transport.Request, local transport.Local, flags uint8) (*pull, error) {
	if len(local.Addrs) != int(req.Local.Tensors) {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "%d addresses for %d tensors", len(local.Addrs), req.Local.Tensors)
	}
	length := requestBytes(req)
	if length > maxBody {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "the request has %d bytes, more than a control frame of %d", length, maxBody).
			Hinting("split the block lists over several calls")
	}
	id := s.next.Add(1)
	p := &pull{id: id, lane: s.lanes[id%uint64(len(s.lanes))], req: req, resolve: flags&flagResolve != 0,
		stream: newStream(false), done: make(chan struct{}), left: make(chan struct{}), acked: make(chan status.Code, 1)}
	p.stream.addrs = append(p.stream.addrs[:0], local.Addrs...)
	h := header{kind: kindRequest, flags: flags, length: uint32(length), operation: id, a: requestMillis(deadline)}
	f, body, err := s.newFrame(h)
	if err != nil {
		return nil, err
	}
	putRequest(body, req)
	s.mu.Lock()
	if cause := s.cause; cause != nil {
		s.mu.Unlock()
		s.putBuffer(f.buffer)
		return nil, status.Newf(status.NotYetLink, status.StageResolve, "the link has ended: %w", cause)
	}
	s.pulls[id] = p
	s.mu.Unlock()
	p.lane.enqueue(f)
	return p, nil
}

// noDeadline is what the owner is told where the caller has none: an hour.
const noDeadline = time.Hour

func requestMillis(deadline time.Time) uint64 {
	if deadline.IsZero() {
		return deadlineMillis(noDeadline)
	}
	return deadlineMillis(time.Until(deadline))
}

// wait returns when the operation has ended and nothing of it touches local memory any more.
func (s *Session) wait(ctx context.Context, p *pull) error {
	select {
	case <-p.done:
	case <-ctx.Done():
		p.end(transport.Ended(ctx))
	}
	<-p.left
	p.mu.Lock()
	err, told := p.err, p.told
	p.mu.Unlock()
	if err != nil && !told && !p.lane.withdraw(p.id) {
		s.tell(p.lane, header{kind: kindCancel, operation: p.id})
	}
	return err
}

// confirm tells the owner that every byte has arrived, which releases the key, and waits for its answer. Once DONE is under way the
// pull can't fail any more without losing the key: where the link or the deadline ends first, it has succeeded.
func (s *Session) confirm(ctx context.Context, p *pull) error {
	h := header{kind: kindDone, operation: p.id, a: uint64(p.req.Plan.SrcTensors.First), b: uint64(p.req.Plan.SrcTensors.Count)}
	if p.req.Plan.SrcTensors.All {
		h.flags = flagAll
	}
	s.tell(p.lane, h)
	select {
	case code := <-p.acked:
		if code != status.Success {
			return status.New(code, status.StageVerify, "the owner's lease had ended before it was confirmed; the key was not released")
		}
	case <-s.closing:
	case <-ctx.Done():
	}
	return nil
}

// forget takes the operation off the table. What still arrives for it is drained.
func (s *Session) forget(p *pull) {
	s.mu.Lock()
	listed := s.pulls[p.id] == p
	delete(s.pulls, p.id)
	s.wakeIdle()
	s.mu.Unlock()
	if listed { // a lease may be confirmed and then abandoned; two operations must never share a stream
		p.stream.recycle()
	}
}

func (s *Session) pulling(operation uint64) *pull {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pulls[operation]
}

// placing returns the operation of a data frame, or nil where it has ended.
func (s *Session) placing(h header) (*pull, error) {
	p := s.pulling(h.operation)
	if p == nil {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.ended:
		return nil, nil
	case !p.planned:
		return nil, protocolError("data before its entry")
	case h.a > p.entry.total || uint64(h.length) > p.entry.total-h.a:
		return nil, protocolError("data beyond the end of its operation")
	}
	return p, nil
}

// placed counts bytes whose frame is whole.
func (s *Session) placed(p *pull, bytes uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return // it was drained, not placed
	}
	if p.placed += bytes; p.placed >= p.entry.total {
		p.told = true
		p.endLocked(nil)
	}
}

// entry takes an ENTRY frame: what the owner resolved. The first of an operation makes its plan.
func (s *Session) entry(h header, body []byte) error {
	e, err := parseEntry(body)
	if err != nil {
		return err
	}
	p := s.pulling(h.operation)
	if p == nil || !p.enter() { // entered, so that the request stays ours while the plan is built
		return nil
	}
	defer p.exit()
	p.planMu.Lock()
	defer p.planMu.Unlock()
	p.mu.Lock()
	planned := p.planned
	p.mu.Unlock()
	if planned {
		return nil
	}
	if !p.resolve {
		err = p.build(&e)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.endLocked(err)
		return nil
	}
	p.planned, p.entry = true, e
	if p.resolve {
		p.told = true
		p.endLocked(nil)
	}
	return nil
}

// build makes the same plan as the owner and compares.
func (p *pull) build(e *entry) error {
	p.req.Plan.SrcBatch = e.batch
	segments, err := plan.Build(&p.req.Plan, e.shape, p.req.Local, p.stream.segments)
	if err != nil {
		return err
	}
	p.stream.segments = segments
	if total := p.stream.index(); total != e.total || plan.Hash(&p.req.Plan, segments) != e.hash {
		return status.New(status.Failed, status.StageCheck, "the two ends planned differently").
			Hinting("run the same version on both ends")
	}
	return nil
}

// failed takes a FAIL frame.
func (s *Session) failed(h header, body []byte) {
	p := s.pulling(h.operation)
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told = true
	p.endLocked(refusal(h.a, body))
}

// refusal reads what a FAIL frame says. The peer chooses among what we know: a status or a stage that we don't becomes the general one.
func refusal(code uint64, body []byte) *status.Error {
	parts := strings.SplitN(strings.ToValidUTF8(string(body), "\uFFFD"), "\x00", 3)
	e := status.New(status.Failed, status.StageTransfer, "the owner has refused")
	switch c := status.Code(code); c {
	case status.CacheNotExist, status.ParamInvalid, status.Timeout, status.LinkBusy, status.OutOfMemory, status.EngineFinalized,
		status.FeatureNotEnabled:
		e.Code = c
	}
	switch stage := status.Stage(parts[0]); stage {
	case status.StageCheck, status.StageResolve, status.StageRegister, status.StageLookup, status.StageVerify, status.StageClose:
		e.Stage = stage
	}
	if len(parts) > 1 && parts[1] != "" {
		e.Cause = parts[1]
	}
	if len(parts) > 2 {
		e.Hint = parts[2]
	}
	return e
}

// confirmed takes the answer to DONE.
func (s *Session) confirmed(h header) {
	if p := s.pulling(h.operation); p != nil {
		select {
		case p.acked <- status.Code(h.a):
		default: // a second answer changes nothing
		}
	}
}
