// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"sync"
	"sync/atomic"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// A lane is one data connection with the two goroutines that drive it. Receiving is a role: the lane's goroutine has it, or a caller
// who waits for a small pull (see lead).
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

	turn    chan struct{} // holds the receiving role while nobody has it
	callers atomic.Int32  // callers who wait for the role
	rx      receiving     // whoever has the role works on it

	polling atomic.Bool // who receives looks at poked before it sleeps
	poked   atomic.Bool // there is something to send
}

// Where things lie in a lane's fixed buffer.
const (
	txHeaderAt  = 0
	txTrailerAt = txHeaderAt + headerBytes
	txEntryAt   = 128
	rxAt        = 256 // what was received and is not a data frame's payload
	fixedBytes  = 4096
	rxBytes     = fixedBytes - rxAt
)

// scratchBytes is the size of the memory that takes what nobody wants.
const scratchBytes = 64 << 10

// workspace is what a lane needs only while it is active: an idle link gives it back.
type workspace struct {
	spans []mem.Span
	moves []mem.Move
}

// spaces recycles workspaces over all lanes of the process.
var spaces = sync.Pool{New: func() any {
	return &workspace{spans: make([]mem.Span, 0, mem.MaxSpans), moves: make([]mem.Move, 0, mem.MaxSpans)}
}}

// active is what a side of a lane, sending or receiving, needs only while it is active.
type active struct {
	space   *workspace
	scratch *mem.Buffer
	stage   *mem.Buffer // see staged
}

func (a *active) workspace() *workspace {
	if a.space == nil {
		a.space = spaces.Get().(*workspace)
	}
	return a.space
}

// spans returns room for the spans of one system call.
func (a *active) spans() []mem.Span { return a.workspace().spans[:0] }

// waste appends scratch memory for bytes that nobody wants, or that can't come from where they should, as far as one system call takes
// it and a span for what follows, and returns how many bytes that is.
func (a *active) waste(spans []mem.Span, bytes uint64) ([]mem.Span, uint64, error) {
	if a.scratch == nil {
		b, err := newBuffer(scratchBytes)
		if err != nil {
			return spans, 0, err
		}
		a.scratch = b
	}
	var covered uint64
	for covered < bytes && len(spans) < mem.MaxSpans-1 {
		run := min(scratchBytes, bytes-covered)
		spans = append(spans, mem.Span{Addr: a.scratch.Addr(), Bytes: run})
		covered += run
	}
	return spans, covered, nil
}

// rest gives everything back.
func (a *active) rest() {
	if a.space != nil {
		spaces.Put(a.space)
		a.space = nil
	}
	for _, b := range []**mem.Buffer{&a.scratch, &a.stage} {
		if *b != nil {
			_ = (*b).Free() // see Session.Close
			*b = nil
		}
	}
}

func newLane(s *Session, index int, conn transport.Conn, seat seat) (*lane, error) {
	fixed, err := newBuffer(fixedBytes)
	if err != nil {
		return nil, err
	}
	l := &lane{session: s, index: index, conn: conn, seat: seat, fixed: fixed, wake: make(chan struct{}, 1), turn: make(chan struct{}, 1)}
	l.turn <- struct{}{}
	return l, nil
}

// release frees what the lane owns, once nobody receives any more. Its goroutines have ended.
func (l *lane) release() {
	<-l.turn // and nobody gets it after this
	l.queueMu.Lock()
	for _, f := range l.queue {
		_ = f.buffer.Free() // see Session.Close
	}
	l.queue, l.released = nil, true
	l.queueMu.Unlock()
	l.rx.active.rest()
	l.rx.drop()
	_ = l.fixed.Free()
	_ = l.conn.Close() // the stream has been shut down: nothing is lost with an error here
}

func (l *lane) span(at, bytes int) mem.Span {
	return mem.Span{Addr: l.fixed.Addr() + uintptr(at), Bytes: uint64(bytes)}
}

// maxAnswers bounds the answers that wait on a lane until the peer reads. Each operation that it may have open costs at most one, so
// that only a peer that asks and asks without reading gets there.
const maxAnswers = 2 * maxOperations

func (l *lane) handle(h header, body []byte) error {
	s := l.session
	if (h.kind == kindRequest || h.kind == kindDone || h.kind == kindPush) && l.unread() > maxAnswers {
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
	case kindJoin:
		l.rx.apart = h.a > apartAbove
		l.push()
	case kindPush:
		return s.pushed(l, h, body)
	}
	return nil
}
