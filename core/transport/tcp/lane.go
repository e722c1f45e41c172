// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// A lane is one data connection with the two goroutines that drive it.
type lane struct {
	session *Session
	index   int
	conn    transport.Conn
	seat    seat
	fixed   *mem.Buffer // headers, trailers and small bodies; the offsets are below
	wake    chan struct{}

	queueMu sync.Mutex // guards what follows
	queue   []frame    // control frames, first in, first out; they go before data
	answers int        // of these, what the peer's frames have made us say

	released bool // nothing is sent any more: a frame that comes now is dropped

	sendMu sync.Mutex // whoever holds it drives the sending side: tx
	tx     sending

	rx receiving // the receiving goroutine's own
}

// Where things lie in a lane's fixed buffer.
const (
	txHeaderAt  = 0
	txTrailerAt = txHeaderAt + headerBytes
	rxTrailerAt = 64 // directly before the header, so that one span takes both
	rxHeaderAt  = rxTrailerAt + trailerBytes
	txEntryAt   = 128
	rxBodyAt    = 256
	fixedBytes  = 4096
)

// scratchBytes is the size of the memory that takes what nobody wants.
const scratchBytes = 64 << 10

// workspace is what a lane needs only while it is active: an idle link gives it back.
type workspace struct {
	spans []mem.Span
}

// spaces recycles workspaces over all lanes of the process.
var spaces = sync.Pool{New: func() any { return &workspace{spans: make([]mem.Span, 0, mem.MaxSpans)} }}

func newLane(s *Session, index int, conn transport.Conn, seat seat) (*lane, error) {
	fixed, err := newBuffer(fixedBytes)
	if err != nil {
		return nil, err
	}
	return &lane{session: s, index: index, conn: conn, seat: seat, fixed: fixed, wake: make(chan struct{}, 1)}, nil
}

// release frees what the lane owns. Its goroutines have ended.
func (l *lane) release() {
	l.queueMu.Lock()
	for _, f := range l.queue {
		_ = f.buffer.Free() // see Session.Close
	}
	l.queue, l.released = nil, true
	l.queueMu.Unlock()
	_ = l.fixed.Free()
	_ = l.conn.Close() // the stream has been shut down: nothing is lost with an error here
}

func (l *lane) span(at, bytes int) mem.Span {
	return mem.Span{Addr: l.fixed.Addr() + uintptr(at), Bytes: uint64(bytes)}
}

// receiving is the state of the receiving side between frames.
type receiving struct {
	have    int // bytes of the next header that have arrived already
	space   *workspace
	scratch *mem.Buffer
	request transport.Request
}

func (l *lane) receiveLoop() {
	defer l.session.workers.Done()
	l.seat.take()
	defer l.seat.leave()
	for {
		if err := l.receiveFrame(); err != nil {
			l.dropSpace()
			l.session.broke(err)
			return
		}
	}
}

func (l *lane) receiveFrame() error {
	for l.rx.have < headerBytes {
		n, err := l.await(l.span(rxHeaderAt+l.rx.have, headerBytes-l.rx.have))
		if err != nil {
			return err
		}
		l.rx.have += n
	}
	l.rx.have = 0
	h, err := parseHeader(l.fixed.Bytes()[rxHeaderAt : rxHeaderAt+headerBytes])
	if err != nil {
		return err
	}
	if h.kind == kindData {
		return l.receiveData(h)
	}
	return l.receiveControl(h)
}

// defaultSpin is how long a receiver polls before it sleeps in the system call: waking a sleeper on an idle core costs tens of
// microseconds, and frames of one operation follow each other closely.
const defaultSpin = 50 * time.Microsecond

// idleRounds is how many waits of MaxWaitMillis pass before a lane is parked.
const idleRounds = 1

// await receives at least one byte of the next header: first polling, then sleeping, then parked.
func (l *lane) await(into mem.Span) (int, error) {
	spans := [1]mem.Span{into}
	spin := l.session.cfg.Spin
	if spin == 0 {
		spin = defaultSpin
	}
	for start := time.Now(); ; {
		if n, err := l.conn.TryReceive(spans[:]); n > 0 || err != nil {
			return n, err
		}
		if time.Since(start) > spin {
			break
		}
		runtime.Gosched() // whom the last frame has woken runs now, on this thread, instead of waiting for another to wake up
	}
	for rounds := 0; ; rounds++ {
		if rounds >= idleRounds {
			l.dropSpace()
			l.seat.leave() // a parked connection has no thread
			l.conn.Park()
			l.seat.take()
		}
		if n, err := l.conn.Receive(spans[:]); n > 0 || err != nil {
			return n, err
		}
	}
}

func (l *lane) takeSpace() []mem.Span {
	if l.rx.space == nil {
		l.rx.space = spaces.Get().(*workspace)
	}
	return l.rx.space.spans[:0]
}

func (l *lane) dropSpace() {
	l.rx.request = transport.Request{} // its block lists can have megabytes
	if l.rx.space != nil {
		spaces.Put(l.rx.space)
		l.rx.space = nil
	}
	if l.rx.scratch != nil {
		_ = l.rx.scratch.Free() // see Session.Close
		l.rx.scratch = nil
	}
}

// scratch returns memory for bytes that nobody wants.
func (l *lane) scratch() (mem.Span, error) {
	if l.rx.scratch == nil {
		b, err := newBuffer(scratchBytes)
		if err != nil {
			return mem.Span{}, err
		}
		l.rx.scratch = b
	}
	return mem.Span{Addr: l.rx.scratch.Addr(), Bytes: scratchBytes}, nil
}

// receiveData places one data frame, or drains it where its operation has ended.
func (l *lane) receiveData(h header) error {
	op, err := l.session.placing(h)
	if err != nil {
		return err
	}
	length := uint64(h.length)
	for done := uint64(0); done < length+trailerBytes; {
		n, err := l.receivePart(op, h.a, done, length)
		if errors.Is(err, unix.EFAULT) && op != nil {
			op.end(status.New(status.ParamInvalid, status.StageTransfer, "the destination's memory is not mapped or not writable").
				Hinting("keep registered memory mapped until unregister_cache has returned"))
			err = nil
		}
		if err != nil {
			return err
		}
		done += uint64(n)
		if done > length+trailerBytes {
			l.rx.have = int(done - length - trailerBytes)
		}
	}
	if op != nil {
		trailer := reader{b: l.fixed.Bytes()[rxTrailerAt : rxTrailerAt+trailerBytes]}
		if trailer.u64() == 0 {
			l.session.placed(op, length)
		}
	}
	return nil
}

// receivePart makes one system call for stream bytes [offset+done, offset+length), the trailer and the next header. It never reads past
// that header. An operation is entered for the length of this one call only, so that whoever ends it waits for no more than that.
func (l *lane) receivePart(op *pull, offset, done, length uint64) (int, error) {
	spans := l.takeSpace()
	covered := uint64(0)
	if done < length {
		if op != nil && op.enter() {
			defer op.exit()
			spans, covered = op.stream.spans(spans, mem.MaxSpans-1, offset+done, length-done)
		} else {
			waste, err := l.scratch()
			if err != nil {
				return 0, err
			}
			for covered < length-done && len(spans) < mem.MaxSpans-1 {
				waste.Bytes = min(scratchBytes, length-done-covered)
				spans = append(spans, waste)
				covered += waste.Bytes
			}
		}
	}
	if done+covered >= length {
		past := int(max(done, length) - length) // bytes of the trailer that are here already
		spans = append(spans, l.span(rxTrailerAt+past, trailerBytes-past+headerBytes))
	}
	return l.conn.Receive(spans)
}

// receiveControl takes a frame with a body that belongs into our own memory.
func (l *lane) receiveControl(h header) error {
	body := l.fixed.Bytes()[rxBodyAt:]
	at := l.fixed.Addr() + rxBodyAt
	if int(h.length) > len(body) {
		buffer, err := newBuffer(int(h.length))
		if err != nil {
			return err
		}
		defer func() { _ = buffer.Free() }() // see Session.Close
		body, at = buffer.Bytes(), buffer.Addr()
	}
	body = body[:h.length]
	spans := [1]mem.Span{}
	for got := 0; got < len(body); {
		spans[0] = mem.Span{Addr: at + uintptr(got), Bytes: uint64(len(body) - got)}
		n, err := l.conn.Receive(spans[:])
		if err != nil {
			return err
		}
		got += n
	}
	return l.handle(h, body)
}

// maxAnswers bounds the answers that wait on a lane until the peer reads. Each operation that it may have open costs at most one, so
// that only a peer that asks and asks without reading gets there.
const maxAnswers = 2 * maxOperations

func (l *lane) handle(h header, body []byte) error {
	s := l.session
	if (h.kind == kindRequest || h.kind == kindDone) && l.unread() > maxAnswers {
		return protocolError("request after request without reading the answers")
	}
	switch h.kind {
	case kindRequest:
		return s.request(l, h, body)
	case kindEntry:
		return s.entry(h, body)
	case kindFail:
		s.failed(h, body)
	case kindCancel:
		s.cancelled(h)
	case kindDone:
		return s.done(l, h)
	case kindConfirmed:
		s.confirmed(h)
	}
	return nil
}
