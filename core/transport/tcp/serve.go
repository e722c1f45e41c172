// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"bytes"
	"sync/atomic"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// serve is one operation of the peer on our memory, from its request until its bytes have gone out or, where there is a lease, until
// DONE, CANCEL, its lease's end or the death of the link.
type serve struct {
	session *Session
	id      uint64
	lane    *lane // the request's; answers go there too
	source  transport.Source
	leased  bool       // the pull consumes its key, or asks for the lease
	judged  bool       // the initiator can't tell whether what it read was the cache's, and is told
	shape   plan.Shape // of the source
	stream  *stream    // recycled when the operation rests
	total   uint64
	chunk   uint64                         // bytes of a data frame
	pinned  *lane                          // the one lane that carries it, nil: all do
	entry   [headerBytes + entryBytes]byte // goes out before the first chunk on each lane
	expires time.Time

	ending atomic.Bool // no more bytes of the source are wanted or allowed

	// Guarded by session.mu:
	next    uint64      // stream bytes that were claimed
	busy    int         // lanes that have a chunk under way
	entered uint32      // lanes on which the entry has gone out, by bit
	timer   *time.Timer // the operation's end at the latest
	settled bool
	outcome *plan.Range // tensors that the initiator confirmed; nil: nothing
}

const (
	// stripeAbove is what is worth a second connection: below it one system call moves everything.
	stripeAbove = 256 << 10
	// apartAbove takes so long, some milliseconds at least, that the owner's receivers are parked meanwhile. It costs the next request,
	// and a cancel, one more change of threads.
	apartAbove = 32 << 20
	// leastChunk keeps the frames of a striped operation from becoming many and small.
	leastChunk = 128 << 10
	// wholeShare is the most that a connection takes as one chunk; more is halved at least, so that the faster one can take more. What
	// its frame costs is 10% of a chunk of half of this.
	wholeShare = 1 << 20
)

const (
	// maxOperations bounds what a peer may have open, whatever it sends: far more than an engine has calls under way.
	maxOperations = 4096
	// maxSegments bounds the plans of all these together, some 700 MiB: one of the largest size, and room beside it.
	maxSegments = plan.MaxSegments + 1<<20
)

// request serves a REQUEST frame.
func (s *Session) request(l *lane, h header, body []byte) error {
	req := &l.rx.request
	if err := parseRequest(body, req); err != nil {
		return err
	}
	source, err := s.cfg.Owner.Open(req)
	if err != nil {
		s.refuse(l, h.operation, status.From(err, status.StageLookup))
		return nil
	}
	v := &serve{session: s, id: h.operation, lane: l, source: source, leased: source.Consumes() || req.Lease, judged: req.Lease, stream: newStream(true)}
	s.planning.Lock()
	err = v.prepare(h, req)
	if err == nil {
		err = s.reserve(v)
	}
	s.planning.Unlock()
	if err != nil {
		source.Drop()
		v.stream.recycle()
		s.refuse(l, h.operation, status.From(err, status.StageCheck))
		return nil
	}
	l.rx.apart = v.total > apartAbove
	return s.admit(v)
}

// reserve counts the operation, or refuses it where its peer has too much open.
func (s *Session) reserve(v *serve) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.full(len(v.stream.segments)) {
		return s.busy()
	}
	s.segments += len(v.stream.segments)
	return nil
}

// full says whether the peer has too much open for one more operation. The caller holds mu.
func (s *Session) full(segments int) bool {
	return len(s.serves)+len(s.receipts) >= maxOperations || s.segments+segments > maxSegments
}

// busy refuses an operation for that. The caller holds mu.
func (s *Session) busy() error {
	return status.Newf(status.LinkBusy, status.StageCheck,
		"this link has %d pulls and %d pushes open with %d pieces of memory, more than the owner serves at once",
		len(s.serves), len(s.receipts), s.segments).Hinting("try again when others have ended")
}

// prepare builds the plan and the entry that tells the initiator of it.
func (v *serve) prepare(h header, req *transport.Request) error {
	shape := v.source.Shape()
	e := entry{generation: v.source.Generation(), shape: shape, batch: v.source.Batch(), leased: v.leased, whole: v.source.Whole(),
		native: v.source.Native()}
	if h.flags&flagResolve == 0 {
		req.Plan.SrcBatch, req.Plan.Whole = e.batch, e.whole
		segments, err := plan.Build(&req.Plan, shape, req.Local, v.stream.segments)
		if err != nil {
			return err
		}
		v.stream.segments = segments
		v.total = v.stream.index()
		e.total, e.hash = v.total, plan.Hash(&req.Plan, segments)
		v.stream.addrs = v.stream.addrs[:0]
		for t := range shape.Tensors {
			v.stream.addrs = append(v.stream.addrs, v.source.Address(t))
		}
		if v.source.OnDevice() {
			v.stream.device = v.session.cfg.Device
		}
	}
	v.shape = shape
	(&header{kind: kindEntry, length: entryBytes, operation: v.id}).put(v.entry[:])
	putEntry(v.entry[headerBytes:], &e)
	v.expires = deadlineFrom(time.Now(), h.a).Add(leaseGrace)
	most := v.session.frame
	if v.stream.device != nil {
		most = farFrame
	}
	v.chunk = most
	if lanes := uint64(len(v.session.lanes)); v.total <= stripeAbove || h.flags&flagOneLane != 0 {
		v.pinned = v.lane
	} else {
		share := v.total / lanes
		if share > wholeShare {
			share /= 2
		}
		v.chunk = min(most, max(leastChunk, (share+4095)&^4095))
	}
	return nil
}

// admit puts an operation to work.
func (s *Session) admit(v *serve) error {
	s.mu.Lock()
	twice := s.serves[v.id] != nil || s.receipts[v.id] != nil
	if s.cause != nil || twice {
		s.segments -= len(v.stream.segments)
		s.mu.Unlock()
		v.settle()
		if twice {
			return protocolError("two requests of one number")
		}
		return nil
	}
	s.serves[v.id] = v
	s.open.Add(1)
	v.timer = time.AfterFunc(time.Until(v.expires), v.expire)
	if v.total > 0 {
		s.sending = append(s.sending, v)
	}
	s.mu.Unlock()
	if v.total > 0 {
		s.pushAll(v)
		return nil
	}
	return s.answerEntry(v)
}

// answerEntry serves an operation that wants the entry alone.
func (s *Session) answerEntry(v *serve) error {
	f, b, err := s.newFrame(header{kind: kindEntry, length: entryBytes, operation: v.id})
	if err != nil {
		return err
	}
	copy(b, v.entry[headerBytes:])
	if !v.leased {
		v.finish(nil)
	}
	v.lane.enqueue(f)
	return nil
}

// pushAll wakes the other lanes where they share the work, and sends on the request's own lane at once.
func (s *Session) pushAll(v *serve) {
	if v.pinned == nil {
		for _, other := range s.lanes {
			if other != v.lane {
				other.poke()
			}
		}
	}
	v.lane.push()
}

// refuse answers a request with a failure.
func (s *Session) refuse(l *lane, operation uint64, e *status.Error) {
	text := bytes.Join([][]byte{[]byte(e.Stage), []byte(e.Cause), []byte(e.Hint)}, []byte{0})
	if len(text) > maxCause {
		text = text[:maxCause]
	}
	f, b, err := s.newFrame(header{kind: kindFail, length: uint32(len(text)), operation: operation, a: uint64(e.Code)})
	if err != nil {
		s.broke(err)
		return
	}
	copy(b, text)
	l.enqueue(f)
}

// chunk is a run of an operation's stream that a lane has claimed.
type chunk struct {
	serve          *serve
	offset, length uint64
	first          bool // of this operation on this lane
}

// claim takes the next chunk for a lane. Operations take turns.
func (s *Session) claim(l *lane) (chunk, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, v := range s.sending {
		if v.pinned != nil && v.pinned != l {
			continue
		}
		c := chunk{serve: v, offset: v.next, length: min(v.chunk, v.total-v.next), first: v.entered&(1<<l.index) == 0}
		v.next += c.length
		v.busy++
		v.entered |= 1 << l.index
		s.sending = append(s.sending[:i], s.sending[i+1:]...)
		if v.next < v.total {
			s.sending = append(s.sending, v)
		}
		return c, true
	}
	return chunk{}, false
}

// chunkDone is called when a lane has let go of a chunk.
func (s *Session) chunkDone(v *serve) {
	s.mu.Lock()
	v.busy--
	sent := v.next == v.total && v.busy == 0
	if sent && !v.leased {
		v.ending.Store(true)
	}
	settle := v.mayRest()
	s.mu.Unlock()
	if sent && v.total > apartAbove {
		s.unpark()
	}
	if settle {
		v.settle()
	}
}

// roused is a connection of which one who is parked on it can be told to go on.
type roused interface {
	Rouse()
}

// unpark has receivers that are parked receive again.
func (s *Session) unpark() {
	for _, l := range s.lanes {
		if c, ok := l.conn.(roused); ok {
			c.Rouse()
		}
	}
}

// mayRest reports, once, that nothing of the operation is under way any more. The caller holds session.mu.
func (v *serve) mayRest() bool {
	if v.settled || v.busy > 0 || !v.ending.Load() {
		return false
	}
	v.settled = true
	delete(v.session.serves, v.id)
	v.session.open.Add(-1)
	v.session.segments -= len(v.stream.segments)
	v.session.unlist(v)
	v.session.wakeIdle()
	return true
}

// unlist takes an operation off the list of those that have chunks to claim. The caller holds mu.
func (s *Session) unlist(v *serve) {
	for i, other := range s.sending {
		if other == v {
			s.sending = append(s.sending[:i], s.sending[i+1:]...)
			return
		}
	}
}

// settle lets go of the source. No lane uses the operation any more.
func (v *serve) settle() {
	if v.timer != nil {
		v.timer.Stop()
	}
	v.stream.recycle()
	if v.outcome == nil {
		v.source.Drop()
		return
	}
	answer := header{kind: kindConfirmed, operation: v.id}
	if own := v.source.Done(*v.outcome); v.judged && !own {
		answer.a = uint64(status.CacheNotExist)
	}
	v.session.tell(v.lane, answer) // after Done: the initiator's call may return now
}

// stopped reports that no more bytes may be sent.
func (v *serve) stopped() bool { return v.ending.Load() }

// finish ends the operation, with the tensors that the initiator confirmed, which is then answered, or with nothing. It reports whether
// this call ended it.
func (v *serve) finish(outcome *plan.Range) bool {
	s := v.session
	s.mu.Lock()
	if v.ending.Swap(true) {
		s.mu.Unlock()
		return false
	}
	v.outcome = outcome
	s.unlist(v)
	settle := v.mayRest()
	s.mu.Unlock()
	if settle {
		v.settle()
	}
	return true
}

// expire ends an operation whose initiator has let its deadline pass by more than the grace.
func (v *serve) expire() {
	v.fail(status.New(status.Timeout, status.StageTransfer, "the deadline has passed by the owner's clock"))
}

// abandon ends an operation whose link is gone.
func (v *serve) abandon() { v.finish(nil) }

// fail ends the operation and tells the initiator why.
func (v *serve) fail(e *status.Error) {
	if v.finish(nil) {
		v.session.refuse(v.lane, v.id, e)
	}
}

// cancelled serves a CANCEL frame.
func (s *Session) cancelled(h header) {
	if v := s.serving(h.operation); v != nil {
		v.finish(nil)
		return
	}
	s.mu.Lock()
	r := s.receipts[h.operation]
	s.mu.Unlock()
	if r != nil {
		r.cancel(errGivenUp)
	}
}

// done serves a DONE frame: the key is released, and nothing else releases it.
func (s *Session) done(l *lane, h header) error {
	if v := s.serving(h.operation); v != nil {
		tensors := h.tensors()
		if !v.leased || !tensors.Inside(v.shape) {
			return protocolError("a DONE for what it has not asked for")
		}
		if v.finish(&tensors) {
			return nil // settle answers
		}
	}
	s.tell(l, header{kind: kindConfirmed, operation: h.operation, a: uint64(status.Timeout)})
	return nil
}

func (s *Session) serving(operation uint64) *serve {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serves[operation]
}
