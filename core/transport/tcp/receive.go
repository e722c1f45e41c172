// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// phase is what a lane's stream has to bring next.
type phase uint8

const (
	atHeader phase = iota
	inBody
	inData
	atTrailer
)

// receiving is how far a lane's stream has been taken in. The receiving role may change hands after any step, in the middle of a frame
// too. Whatever is not payload goes through a part of the fixed buffer (from rxAt on), in which [from, have) has arrived and was not
// looked at yet.
type receiving struct {
	from, have int
	phase      phase
	h          header
	left       uint64      // bytes of the payload that are still to come
	body       *mem.Buffer // of a control frame that the fixed buffer does not hold
	filled     int         // of body
	led        bool        // the last frame was for a pull whose caller may receive itself
	apart      bool        // the last frame has asked for so much that the next one is some milliseconds away

	active
	stint   mem.Stint
	request transport.Request
}

func (rx *receiving) ready() int { return rx.have - rx.from }

// arrived is how far the payload under way has come, as an offset in its operation's stream.
func (rx *receiving) arrived() uint64 { return rx.h.a + uint64(rx.h.length) - rx.left }

// between says that no frame is under way.
func (rx *receiving) between() bool { return rx.phase == atHeader && rx.ready() == 0 }

func (l *lane) receiveLoop() {
	defer l.session.workers.Done()
	for {
		l.conn.Park()
		<-l.turn
		err := l.attend()
		if err != nil {
			l.session.broke(err) // before anybody else receives, from the middle of a frame that made no sense
		}
		l.turn <- struct{}{}
		if err != nil {
			return
		}
	}
}

const (
	// defaultSpin is how long a receiver polls before it sleeps in the system call: waking a sleeper on an idle core costs tens of
	// microseconds, and frames of one operation follow each other closely.
	defaultSpin = 50 * time.Microsecond
	// lingering bounds how long anybody polls where nothing is under way (design, Budgets).
	lingering = time.Millisecond
	// idleRounds is how many waits of MaxWaitMillis pass before a lane is parked.
	idleRounds = 1
)

// attend receives, as the lane's own goroutine, until the lane is idle or a caller had better receive.
func (l *lane) attend() error {
	defer func() {
		l.rx.request = transport.Request{} // its block lists can have megabytes
		l.rest()
	}()
	l.seat.take(&l.rx.stint)
	defer l.rx.stint.Leave() // a parked connection has no thread
	since := time.Now()
	if l.rx.apart {
		l.rx.apart, since = false, time.Time{} // the peer still has to take in what was sent
	}
	for rounds := 0; rounds < idleRounds; {
		if l.callers.Load() > 0 {
			return nil
		}
		n, err := 0, error(nil)
		if l.rx.between() {
			if n, err = l.poll(since); n == 0 && err == nil && (l.rx.led || l.callers.Load() > 0 || l.rx.apart) {
				return nil
			}
		}
		if n == 0 && err == nil {
			if n, err = l.step(true); n == 0 {
				rounds++
			}
		}
		if err != nil {
			return err
		}
		if n > 0 {
			rounds, since = 0, time.Now()
		}
	}
	return nil
}

// poll looks for bytes, once at least, without sleeping and for as long as that pays off, and sends what other lanes' requests have made ready.
func (l *lane) poll(since time.Time) (int, error) {
	l.polling.Store(true)
	defer func() {
		l.polling.Store(false)
		l.sendPoked()
	}()
	for {
		if n, err := l.step(false); n > 0 || err != nil {
			return n, err
		}
		if l.rx.led || l.callers.Load() > 0 || !l.worthPolling(since) {
			return 0, nil
		}
		l.sendPoked()
		mem.Yield()
	}
}

// worthPolling is polls, except where large frames come from a sender on the same core: polling would take its time.
func (l *lane) worthPolling(since time.Time) bool {
	return !(l.seat.kept && l.session.planned.Load() > 0) && !l.rx.apart && l.session.polls(since)
}

// sendPoked sends what another lane has told this one of.
func (l *lane) sendPoked() {
	if l.poked.Load() && l.poked.Swap(false) {
		l.push()
	}
}

// polls reports whether one who waits since then may go on without sleeping.
func (s *Session) polls(since time.Time) bool {
	limit := s.spin
	if limit > lingering && s.open.Load() == 0 {
		limit = lingering
	}
	return time.Since(since) < limit
}

// leastLead is how much of a wait must be left to sleep in a receiving call, which takes up to MaxWaitMillis.
const leastLead = transport.MaxWaitMillis * time.Millisecond / 2

// lead receives, as a caller who waits for p and has got the turn: the kernel then wakes the thread that wants the bytes, and no other.
// It places what comes for others as the lane's goroutine does, and gives the turn back when p is over or the wait has ended.
// An error is the connection's.
func (l *lane) lead(ctx context.Context, p *pull, until time.Time) error {
	l.watch(false)
	l.rx.stint.Begin()
	err := l.leadOn(ctx, p, until)
	l.rest()
	l.watch(true)
	if err != nil {
		l.session.broke(err) // see receiveLoop
	}
	l.turn <- struct{}{}
	return err
}

func (l *lane) leadOn(ctx context.Context, p *pull, until time.Time) error {
	for since := time.Now(); !p.isOver(); {
		n, err := 0, error(nil)
		if l.session.spin > 0 && l.session.polls(since) {
			n, err = l.step(false)
			if n == 0 && err == nil {
				if ctx.Err() != nil || time.Now().After(until) {
					return nil
				}
				mem.Yield()
				continue
			}
		} else if ctx.Err() != nil || time.Until(until) < leastLead {
			return nil
		} else {
			n, err = l.step(true)
		}
		if err != nil {
			return err
		}
		if n > 0 {
			since = time.Now()
		}
	}
	return nil
}

// watched is a connection that can be told not to wake who is parked on it, while somebody else receives.
type watched interface {
	Watch(on bool)
}

func (l *lane) watch(on bool) {
	if c, ok := l.conn.(watched); ok {
		c.Watch(on)
	}
}

// rest is for the end of a turn.
func (l *lane) rest() {
	l.batch(1) // whoever waits next, parked or not, hears of each byte
	l.rx.active.rest()
}

// step makes one system call and takes in what it brought. An operation is entered for the length of this one call only, so that
// whoever ends it waits for no more than that.
func (l *lane) step(block bool) (int, error) {
	rx := &l.rx
	spans, op, err := l.wanted()
	if err != nil {
		return 0, err
	}
	n := 0
	if block {
		l.await()
		n, err = l.conn.Receive(spans)
	} else {
		n, err = l.conn.TryReceive(spans)
	}
	if op != nil {
		if n > 0 && op.stream.device != nil {
			l.place(op, rx.stage.Addr(), min(uint64(n), rx.left))
		}
		op.exit()
		if errors.Is(err, unix.EFAULT) {
			op.endAs(rx.h.operation, notWritable())
			err = nil
		}
	}
	if block {
		rx.stint.GiveWay() // after what others may wait for
	}
	if err != nil || n == 0 {
		return 0, err
	}
	payload := uint64(0)
	switch {
	case rx.phase == inData:
		payload = min(uint64(n), rx.left)
		rx.left -= payload
	case rx.phase == inBody && rx.body != nil:
		payload = min(uint64(n), uint64(rx.h.length)-uint64(rx.filled))
		rx.filled += int(payload)
	}
	rx.have += n - int(payload)
	return n, l.digest()
}

// batched is a connection that can be told how much to wait for.
type batched interface {
	Batch(bytes int)
}

// Amounts that a receiver of large frames waits for. Woken by each packet it would take the core from the sender for 64 KiB at a time.
const (
	manyBytes = 512 << 10
	someBytes = 64 << 10
)

// await says how much to wait for: half at most of what is certain to come, since what was taken out before the wait does not count.
func (l *lane) await() {
	certain := uint64(0)
	if l.rx.phase == inData {
		certain = l.rx.left
	}
	switch {
	case certain >= 2*manyBytes:
		l.batch(manyBytes)
	case certain >= 2*someBytes:
		l.batch(someBytes)
	default:
		l.batch(1)
	}
}

func (l *lane) batch(bytes int) {
	if c, ok := l.conn.(batched); ok {
		c.Batch(bytes)
	}
}

func notWritable() *status.Error {
	return status.New(status.ParamInvalid, status.StageTransfer, "the destination's memory is not mapped or not writable").
		Hinting("keep registered memory mapped until unregister_cache has returned")
}

// wanted names the memory that the next bytes belong into, and the operation that was entered for that. It never goes past the next
// header where payload may follow that (see ahead).
func (l *lane) wanted() ([]mem.Span, *pull, error) {
	rx := &l.rx
	spans := rx.spans()
	if rx.from > 0 { // what is left is a part of a frame without payload: some bytes
		b := l.fixed.Bytes()[rxAt:]
		copy(b, b[rx.from:rx.have])
		rx.from, rx.have = 0, rx.ready()
	}
	switch rx.phase {
	case inData:
		return l.wantedData(spans)
	case inBody:
		if rx.body != nil {
			return append(spans, mem.Span{Addr: rx.body.Addr() + uintptr(rx.filled), Bytes: uint64(rx.h.length) - uint64(rx.filled)}), nil, nil
		}
		return l.wantedFixed(spans, int(rx.h.length)+headerBytes), nil, nil
	case atTrailer:
		return l.wantedFixed(spans, trailerBytes+headerBytes), nil, nil
	}
	return l.wantedFixed(spans, headerBytes+l.session.ahead()), nil, nil
}

// wantedFixed asks for what the fixed buffer lacks of some bytes.
func (l *lane) wantedFixed(spans []mem.Span, bytes int) []mem.Span {
	bytes = min(bytes, rxBytes)
	return append(spans, l.span(rxAt+l.rx.have, bytes-l.rx.have))
}

// wantedData asks for payload, and for the trailer and the next header where one call can take it all.
func (l *lane) wantedData(spans []mem.Span) ([]mem.Span, *pull, error) {
	rx := &l.rx
	var covered uint64
	var err error
	op := l.session.entering(rx.h.operation)
	switch {
	case op == nil:
		spans, covered, err = rx.waste(spans, rx.left)
	case op.stream.device != nil:
		var stage uintptr
		if stage, err = rx.staged(); err != nil {
			op.exit()
		}
		covered = min(rx.left, farFrame)
		spans = append(spans, mem.Span{Addr: stage, Bytes: covered})
	default:
		spans, covered = op.stream.spans(spans, mem.MaxSpans-1, rx.arrived(), rx.left)
	}
	if err != nil {
		return nil, nil, err
	}
	if covered == rx.left {
		spans = l.wantedFixed(spans, trailerBytes+headerBytes)
	}
	return spans, op, nil
}

// Bytes that a call may take beyond a header, without knowing what that says.
const (
	// aheadOfRequest is for a peer that only asks: all its frames go into our own memory.
	aheadOfRequest = 1024
	// aheadOfEntry is for the answer to our first request: an entry, and the header of the data behind it.
	aheadOfEntry = entryBytes + headerBytes
)

// ahead is how far past a header a call may go. Where pulls have been answered already the next frame may be data, whose payload must
// go to its place; in the other cases that is so rare that place copies it.
func (s *Session) ahead() int {
	switch {
	case s.planned.Load() > 0:
		return 0
	case s.asked.Load() > 0:
		return aheadOfEntry
	}
	return aheadOfRequest
}

// digest takes in all that has arrived.
func (l *lane) digest() error {
	rx := &l.rx
	for {
		var whole bool
		var err error
		switch rx.phase {
		case atHeader:
			whole, err = l.digestHeader()
		case inBody:
			whole, err = l.digestBody()
		case inData:
			whole = l.digestData()
		case atTrailer:
			whole = l.digestTrailer()
		}
		if err != nil || !whole {
			return err
		}
	}
}

// use takes bytes out of the fixed buffer.
func (l *lane) use(bytes int) []byte {
	b := l.fixed.Bytes()[rxAt+l.rx.from:][:bytes]
	if l.rx.from += bytes; l.rx.from == l.rx.have {
		l.rx.from, l.rx.have = 0, 0
	}
	return b
}

func (l *lane) digestHeader() (whole bool, err error) {
	rx := &l.rx
	if rx.ready() < headerBytes {
		return false, nil
	}
	if rx.h, err = parseHeader(l.use(headerBytes)); err != nil {
		return false, err
	}
	if rx.h.kind == kindData {
		rx.phase, rx.left = inData, uint64(rx.h.length)
		return true, l.session.mayPlace(rx.h)
	}
	rx.phase, rx.filled = inBody, 0
	if int(rx.h.length) <= rxBytes-headerBytes {
		return true, nil
	}
	if rx.body, err = newBuffer(int(rx.h.length)); err != nil {
		return false, err
	}
	rx.filled = copy(rx.body.Bytes(), l.use(min(rx.ready(), int(rx.h.length))))
	return true, nil
}

// digestBody handles a control frame when it is whole.
func (l *lane) digestBody() (whole bool, err error) {
	rx := &l.rx
	h, large := rx.h, rx.body
	var body []byte
	switch {
	case large != nil && rx.filled == int(h.length):
		body = large.Bytes()[:h.length]
	case large == nil && rx.ready() >= int(h.length):
		body = l.use(int(h.length))
	default:
		return false, nil
	}
	rx.phase, rx.body = atHeader, nil
	rx.led, rx.apart = h.kind.answers() && l.session.leads(h.operation), false
	err = l.handle(h, body)
	if large != nil {
		_ = large.Free() // see Session.Close
	}
	return true, err
}

// digestData places payload that came ahead of its time.
func (l *lane) digestData() (whole bool) {
	rx := &l.rx
	if bytes := min(uint64(rx.ready()), rx.left); bytes > 0 {
		at := l.fixed.Addr() + uintptr(rxAt+rx.from)
		if op := l.session.entering(rx.h.operation); op != nil {
			l.place(op, at, bytes)
			op.exit()
		}
		l.use(int(bytes))
		rx.left -= bytes
	}
	if rx.left > 0 {
		return false
	}
	rx.phase = atTrailer
	return true
}

// place copies the payload that comes next from an address of ours to its place, or ends its operation. The caller has entered it.
func (l *lane) place(op *pull, at uintptr, bytes uint64) {
	rx := &l.rx
	err := rx.carry(op.stream, at, rx.arrived(), bytes)
	switch {
	case err == nil:
	case op.stream.device != nil:
		op.endAs(rx.h.operation, copyFailed("into the destination", err))
	default:
		op.endAs(rx.h.operation, notWritable())
	}
}

// copyFailed is why an operation ends whose memory's device has failed.
func copyFailed(where string, err error) *status.Error {
	e := *status.From(err, status.StageTransfer)
	e.Stage, e.Cause = status.StageTransfer, "the device could not copy "+where+": "+e.Cause
	return &e
}

func (l *lane) digestTrailer() (whole bool) {
	rx := &l.rx
	if rx.ready() < trailerBytes {
		return false
	}
	trailer := reader{b: l.use(trailerBytes)}
	rx.phase = atHeader
	if trailer.u64() == 0 {
		rx.led = l.session.placed(rx.h.operation, uint64(rx.h.length))
	}
	return true
}

// drop frees what a frame under way holds. Nobody receives any more.
func (rx *receiving) drop() {
	if rx.body != nil {
		_ = rx.body.Free() // see Session.Close
		rx.body = nil
	}
}
