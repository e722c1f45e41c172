// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// pull is one operation of ours; a push is one for which no bytes come. Its bytes are placed by the lanes, each of which enters it for
// one system call at a time; when it has ended nobody enters any more, and the caller waits until the last one has left. Pulls are used
// again: who has found one by its number names that number when it takes the lock.
type pull struct {
	session *Session
	lane    *lane // carries the request and what follows it
	req     *transport.Request
	resolve bool // only the entry is wanted
	push    bool // only the answer is wanted: it is a push
	led     bool // its caller may receive: all of it comes on its lane
	gone    bool // the caller's: left was seen
	barred  bool // the caller's: its lane has failed
	stream  *stream
	timer   *time.Timer // the caller's; stopped between its waits

	left  chan struct{} // gets a value when the operation has ended and no lane is inside
	acked chan status.Code

	planMu sync.Mutex // held while the plan is built, so that two entries build it once

	mu      sync.Mutex // guards what follows
	id      uint64
	planned bool
	entry   entry
	placed  uint64 // bytes whose trailer was good
	inside  int    // lanes that are in a system call on our memory
	ended   bool
	over    bool // left has its value
	told    bool // the owner knows that it has ended
	err     error
}

// sparePulls bounds the pulls that a session keeps to use them again: a few callers' worth.
const sparePulls = 16

// newPull returns a pull with the next number.
func (s *Session) newPull() *pull {
	id := s.next.Add(1)
	s.mu.Lock()
	var p *pull
	if n := len(s.spare); n > 0 {
		p, s.spare = s.spare[n-1], s.spare[:n-1]
	}
	s.mu.Unlock()
	if p == nil {
		p = &pull{session: s, left: make(chan struct{}, 1), acked: make(chan status.Code, 1), timer: time.NewTimer(forever)}
		p.timer.Stop()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.id, p.lane, p.stream = id, s.lanes[id%uint64(len(s.lanes))], newStream(false)
	return p
}

// freeLane is the first on which nobody receives, so that small pulls that follow each other find the owner's end of one lane awake;
// otherwise is for when there is none.
func (s *Session) freeLane(otherwise *lane) *lane {
	for _, l := range s.lanes {
		if len(l.turn) > 0 {
			return l
		}
	}
	return otherwise
}

// recycle gives the pull back. It is off the table, over, and its caller is done with it.
func (p *pull) recycle() {
	p.stream.recycle()
	for len(p.acked) > 0 {
		<-p.acked
	}
	p.mu.Lock()
	p.id, p.lane, p.req, p.stream, p.err, p.placed, p.entry = 0, nil, nil, nil, nil, 0, entry{}
	p.resolve, p.push, p.led, p.gone, p.barred = false, false, false, false, false
	p.planned, p.ended, p.over, p.told = false, false, false, false
	p.mu.Unlock()
	s := p.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.spare) < sparePulls {
		s.spare = append(s.spare, p)
	}
}

// enter lets a lane touch the memory of operation id until exit. It returns false when the operation has ended.
func (p *pull) enter(id uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.id != id || p.ended {
		return false
	}
	p.inside++
	return true
}

func (p *pull) exit() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.inside--
	p.leave()
}

// leave tells the caller when the operation is over. The caller of leave holds mu.
func (p *pull) leave() {
	if p.ended && p.inside == 0 && !p.over {
		p.over = true
		p.left <- struct{}{}
	}
}

// isOver reports that the operation has ended and nothing touches its memory any more.
func (p *pull) isOver() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.over
}

// end ends the operation once, with its result. It never waits.
func (p *pull) end(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endLocked(err)
}

// endAs is end for one who knows the operation by its number.
func (p *pull) endAs(id uint64, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.id == id {
		p.endLocked(err)
	}
}

func (p *pull) endLocked(err error) {
	if p.ended {
		return
	}
	p.ended, p.err = true, err
	p.leave()
}

// Pull copies what req names into local. See transport.Session.
func (s *Session) Pull(ctx context.Context, req *transport.Request, local transport.Local) error {
	if !req.Theirs() {
		if err := transport.AwaitConfirmed(ctx, s); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return transport.Ended(ctx)
	}
	deadline, _ := ctx.Deadline()
	p, err := s.start(deadline, req, local, 0)
	if err != nil {
		return err
	}
	return (*underway)(p).Finish(ctx)
}

// Begin implements transport.Beginner.
func (s *Session) Begin(deadline time.Time, req *transport.Request, local transport.Local) (transport.Operation, error) {
	if s.Unconfirmed() != nil {
		return nil, nil
	}
	p, err := s.start(deadline, req, local, 0)
	if err != nil {
		return nil, err
	}
	return (*underway)(p), nil
}

// underway is a pull that was begun and not yet finished.
type underway pull

// Advance implements transport.Operation.
func (u *underway) Advance(wait time.Duration) bool {
	p := (*pull)(u)
	return p.await(context.Background(), time.Now().Add(wait)) && p.quick()
}

// quick says of an operation whose bytes have arrived, or that has failed, that nothing more is to be asked of the owner.
func (p *pull) quick() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err != nil || !p.entry.leased
}

// Finish implements transport.Operation.
func (u *underway) Finish(ctx context.Context) error {
	p := (*pull)(u)
	s := p.session
	defer s.forget(p, p.id)
	if err := s.wait(ctx, p); err != nil {
		return err
	}
	if p.entry.leased {
		return s.confirm(ctx, p)
	}
	return nil
}

// start registers the operation and sends its request.
func (s *Session) start(deadline time.Time, req *transport.Request, local transport.Local, flags uint8) (*pull, error) {
	if len(local.Addrs) != int(req.Local.Tensors) {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "%d addresses for %d tensors", len(local.Addrs), req.Local.Tensors)
	}
	length := requestBytes(req)
	if err := checkBody(length); err != nil {
		return nil, err
	}
	p := s.newPull()
	p.req, p.resolve = req, flags&flagResolve != 0
	p.stream.addrs = append(p.stream.addrs[:0], local.Addrs...)
	if local.Backing == mem.BackingDevice {
		p.stream.device = s.cfg.Device
	}
	wanted := wantedBytes(req)
	if p.led = p.resolve || len(s.lanes) == 1 || wanted <= stripeAbove; p.led {
		flags |= flagOneLane
		p.lane = s.freeLane(p.lane)
	}
	h := header{kind: kindRequest, flags: flags, length: uint32(length), operation: p.id, a: requestMillis(deadline)}
	f, body, err := s.newFrame(h)
	if err != nil {
		return nil, err
	}
	putRequest(body, req)
	if err := s.list(p, f); err != nil {
		return nil, err
	}
	if !p.led {
		s.join(p, wanted)
	}
	return p, nil
}

// list puts an operation on the table and sends its request.
func (s *Session) list(p *pull, request frame) error {
	s.mu.Lock()
	if cause := s.cause; cause != nil {
		s.mu.Unlock()
		s.putBuffer(request.buffer)
		return status.Newf(status.NotYetLink, status.StageResolve, "the link has ended: %w", cause)
	}
	s.pulls[p.id] = p
	s.mu.Unlock()
	s.open.Add(1)
	s.asked.Add(1)
	p.lane.enqueue(request)
	return nil
}

// checkBody says whether the body of a request or a push fits its frame.
func checkBody(bytes int) error {
	if bytes <= maxBody {
		return nil
	}
	return status.Newf(status.ParamInvalid, status.StageCheck, "the request has %d bytes, more than a control frame of %d", bytes, maxBody).
		Hinting("split the block lists over several calls")
}

// wantedBytes is about how much a request asks for.
func wantedBytes(req *transport.Request) float64 {
	each := float64(req.Local.Stride)
	switch {
	case len(req.Plan.DstBlocks) > 0:
		each *= float64(len(req.Plan.DstBlocks))
	case req.Plan.Size >= 0:
		each = float64(req.Plan.Size)
	}
	return each * float64(req.Plan.DstTensors.Tensors(req.Local))
}

// join has the owner's receivers of the other lanes woken while it plans: they send their part themselves.
func (s *Session) join(p *pull, wanted float64) {
	for _, l := range s.lanes {
		if l != p.lane {
			s.tell(l, header{kind: kindJoin, operation: p.id, a: uint64(wanted)})
		}
	}
}

// noDeadline is what the owner is told where the caller has none: an hour.
const noDeadline = time.Hour

func requestMillis(deadline time.Time) uint64 {
	if deadline.IsZero() {
		return deadlineMillis(noDeadline)
	}
	return deadlineMillis(time.Until(deadline))
}

// await works on the operation, or waits for it, until it is over (true), ctx ends or until has come. One caller at a time.
func (p *pull) await(ctx context.Context, until time.Time) bool {
	if !p.gone && p.mayLead(time.Until(until)) {
		select {
		case <-p.left:
			p.gone = true
		case <-p.lane.turn:
			p.lead(ctx, until)
		default:
		}
	}
	if !p.gone && p.session.cfg.Spin > 0 {
		p.spin(ctx, until)
	}
	for !p.gone {
		if !p.sleep(ctx, until) {
			return false
		}
	}
	return true
}

// mayLead reports whether the caller may receive when it has so long to wait.
func (p *pull) mayLead(wait time.Duration) bool { return p.led && !p.barred && wait >= leastLead }

func (p *pull) lead(ctx context.Context, until time.Time) {
	p.barred = p.lane.lead(ctx, p, until) != nil
	p.lastLook()
}

// spin looks whether the operation is over for as long as it may without sleeping.
func (p *pull) spin(ctx context.Context, until time.Time) {
	for since := time.Now(); p.session.polls(since) && ctx.Err() == nil && time.Now().Before(until); mem.Yield() {
		select {
		case <-p.left:
			p.gone = true
			return
		default:
		}
	}
}

// sleep waits until something has happened, and returns false when it was ctx or until.
func (p *pull) sleep(ctx context.Context, until time.Time) bool {
	wait := time.Until(until)
	p.timer.Reset(wait)
	defer p.timer.Stop()
	turn := p.lane.turn
	if p.mayLead(wait) {
		p.lane.callers.Add(1)
		defer p.lane.callers.Add(-1)
	} else {
		turn = nil
	}
	select {
	case <-p.left:
		p.gone = true
	case <-turn:
		p.lead(ctx, until)
	case <-ctx.Done():
		return p.lastLook()
	case <-p.timer.C:
		return p.lastLook()
	}
	return true
}

// lastLook sees an operation that is over when the wait has ended too.
func (p *pull) lastLook() bool {
	select {
	case <-p.left:
		p.gone = true
	default:
	}
	return p.gone
}

// forever is later than any wait.
const forever = 1 << 40 * time.Microsecond

// wait returns when the operation has ended and nothing of it touches local memory any more.
func (s *Session) wait(ctx context.Context, p *pull) error {
	until, bounded := ctx.Deadline()
	if !bounded {
		until = time.Now().Add(forever)
	}
	for !p.await(ctx, until) {
		if ctx.Err() == nil {
			<-ctx.Done() // the timer was a little earlier
		}
		p.end(transport.Ended(ctx))
		<-p.left
		p.gone = true
	}
	p.mu.Lock()
	err, told := p.err, p.told
	p.mu.Unlock()
	if err != nil && !told && !p.lane.withdraw(p.id) {
		s.tell(p.lane, header{kind: kindCancel, operation: p.id})
	}
	return err
}

// confirm tells the owner that every byte has arrived, which releases the key, and waits for its answer. Once DONE is under way the
// pull can't fail any more without losing the key: where the link or the deadline ends first, it has succeeded. Not so where the owner
// alone can tell what was read.
func (s *Session) confirm(ctx context.Context, p *pull) error {
	s.tell(p.lane, doneHeader(p.id, p.req.Plan.SrcTensors))
	select {
	case code := <-p.acked:
		return unreleased(code)
	case <-s.closing:
		if p.req.Lease {
			return s.ended()
		}
	case <-ctx.Done():
		if p.req.Lease {
			return transport.Ended(ctx)
		}
	}
	return nil
}

// unreleased is what the owner's answer to DONE says.
func unreleased(code status.Code) error {
	switch code {
	case status.Success:
		return nil
	case status.CacheNotExist:
		return status.New(code, status.StageVerify, "the cache was withdrawn during the transfer")
	}
	return status.New(code, status.StageVerify, "the owner's lease had ended before it was confirmed; the key was not released")
}

// ended is why the session has ended.
func (s *Session) ended() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cause
}

// forget takes the operation off the table. What still arrives for it is drained. Only the first call does something: a lease may be
// confirmed and then abandoned.
func (s *Session) forget(p *pull, id uint64) {
	s.mu.Lock()
	listed := s.pulls[id] == p
	if listed {
		delete(s.pulls, id)
		s.open.Add(-1)
		s.asked.Add(-1)
		s.wakeIdle()
	}
	s.mu.Unlock()
	if listed {
		if p.planned && p.entry.total > 0 {
			s.planned.Add(-1)
		}
		p.recycle()
	}
}

func (s *Session) pulling(operation uint64) *pull {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pulls[operation]
}

// entering returns the operation, entered, or nil where it has ended.
func (s *Session) entering(operation uint64) *pull {
	if p := s.pulling(operation); p != nil && p.enter(operation) {
		return p
	}
	return nil
}

// leads reports that an operation's caller may receive.
func (s *Session) leads(operation uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pulls[operation]
	return p != nil && p.led
}

// mayPlace checks the header of a data frame. One whose operation has ended is drained, whatever it says.
func (s *Session) mayPlace(h header) error {
	p := s.pulling(h.operation)
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.id != h.operation, p.ended:
		return nil
	case !p.planned:
		return protocolError("data before its entry")
	case h.a > p.entry.total || uint64(h.length) > p.entry.total-h.a:
		return protocolError("data beyond the end of its operation")
	}
	return nil
}

// placed counts bytes whose frame is whole, and reports that their operation's caller may receive.
func (s *Session) placed(operation, bytes uint64) (led bool) {
	p := s.pulling(operation)
	if p == nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.id != operation || p.ended {
		return false // it was drained, not placed
	}
	led = p.led
	if p.placed += bytes; p.placed >= p.entry.total {
		p.told = true
		p.endLocked(nil)
	}
	return led
}

// entry takes an ENTRY frame: what the owner resolved. The first of an operation makes its plan.
func (s *Session) entry(h header, body []byte) error {
	e, err := parseEntry(body)
	if err != nil {
		return err
	}
	p := s.entering(h.operation) // so that the request stays ours while the plan is built
	if p == nil {
		return nil
	}
	defer p.exit()
	if p.push {
		return protocolError("an entry for a push")
	}
	if p.req.Lease && !e.leased {
		return protocolError("an entry without the lease that was asked for")
	}
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
	if e.total > 0 {
		s.planned.Add(1)
	}
	if p.resolve {
		p.told = true
		p.endLocked(nil)
	}
	return nil
}

// build makes the same plan as the owner and compares.
func (p *pull) build(e *entry) error {
	p.req.Plan.SrcBatch, p.req.Plan.Whole = e.batch, e.whole
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
	if p.id == h.operation {
		e := refusal(h.a, body)
		if p.push {
			p.answer(receiverSays(e))
			return
		}
		p.told = true
		p.endLocked(e)
	}
}

// answer ends a push with the peer's word, unless it has ended otherwise. The caller holds p.mu.
func (p *pull) answer(err error) {
	if !p.ended {
		p.told = true
		p.endLocked(err)
	}
}

// refusal reads what a FAIL frame says. The peer chooses among what we know: a status or a stage that we don't becomes the general one.
func refusal(code uint64, body []byte) *status.Error {
	parts := strings.SplitN(strings.ToValidUTF8(string(body), "\uFFFD"), "\x00", 3)
	e := status.New(status.Failed, status.StageTransfer, "the peer has refused")
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

// confirmed takes the answer to DONE, or to a push.
func (s *Session) confirmed(h header) {
	s.mu.Lock()
	defer s.mu.Unlock() // it stays this operation's while it is on the table
	if p := s.pulls[h.operation]; p != nil && p.push {
		p.mu.Lock()
		p.answer(nil)
		p.mu.Unlock()
	} else if p != nil {
		select {
		case p.acked <- status.Code(h.a):
		default: // a second answer changes nothing
		}
	}
}
