// SPDX-License-Identifier: Apache-2.0

// Package tcp moves bytes over a link's data connections: a served transport. These are TCP connections; where the package serves
// another transport within the host they may be Unix sockets.
//
// The initiator sends a request; the owner resolves it, builds the plan and sends entry and bytes in frames, striped over the
// connections where there is enough to move; the initiator builds the same plan and receives into place (rule 2 of docs/design.md).
// Each connection is driven by system calls on goroutines of its own, one that receives and one that sends, not by Go's network
// poller: that one is told of every packet and costs a third of the throughput on loopback. Who waits for a small pull receives it on
// its own thread. A connection that has been idle is parked, so that threads belong to active connections only.
//
// The package never touches memory of an operation that has ended (rule 4), never keeps a lock while it waits for a peer, and never
// holds up one caller's bytes for another's: frames are at most 1 MiB, 4 MiB on a path within the host, and operations
// take turns.
package tcp

import (
	"errors"
	"io"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Config is what a session is made from.
type Config struct {
	Conns []transport.Conn // one or more; the session takes them over
	Owner transport.Owner  // answers the peer's requests
	// Receiver takes the peer's pushes, each on a goroutine of its own; nil: they are refused.
	Receiver transport.Receiver
	// Spin is how long one who waits polls before it sleeps; 0: defaultSpin; below 0: not at all, as virtual time needs it. Where nothing
	// is under way nobody polls for more than a millisecond.
	Spin time.Duration
	// Device copies from and to memory that lies on it, which is staged in host memory; nil: the host, for which nothing is.
	Device mem.Device
	// Broken is called once, before any call ends of it, when a connection has failed or the peer has broken the protocol. Close waits
	// for it, so it must not call Close itself.
	Broken func(cause error)
}

// leaseGrace is how long after a request's deadline its lease lives at most, by the owner's clock (design §4 Resolve).
const leaseGrace = time.Second

// Session is the tcp transport of one link. It implements transport.Session.
type Session struct {
	cfg   Config
	lanes []*lane
	spin  time.Duration
	frame uint64 // bytes of a data frame that we send, at most

	closing chan struct{} // closed when the session is ending, by shut
	workers sync.WaitGroup
	breaks  sync.WaitGroup // the call of Broken
	release sync.Once      // frees lanes and buffers, after the goroutines have ended
	next    atomic.Uint64  // operation numbers, and by them the lane of a request

	open    atomic.Int64 // operations, own and served
	asked   atomic.Int64 // own operations
	planned atomic.Int64 // of these, those that data frames may come for

	unconfirmed atomic.Pointer[confirmation] // nil: nothing to wait for; changes under mu

	planning sync.Mutex // one plan of the peer's is built at a time, so that what they take together is bounded (maxSegments)

	mu       sync.Mutex // guards what follows
	cause    error      // why the session has ended; nil while it works
	pulls    map[uint64]*pull
	spare    []*pull // to use again
	serves   map[uint64]*serve
	receipts map[uint64]*receipt
	segments int           // of all served operations
	sending  []*serve      // operations that still have chunks to claim, in turn
	idle     chan struct{} // closed when nothing is under way; nil: nobody waits
	buffers  []*mem.Buffer // spare bodies of small frames
}

// NewSession starts a session over conns, which it closes where it fails.
func NewSession(cfg Config) (*Session, error) {
	if len(cfg.Conns) == 0 {
		return nil, status.New(status.ParamInvalid, status.StageCheck, "a session without a data connection")
	}
	if cfg.Device == nil {
		cfg.Device = mem.Host()
	}
	s := &Session{cfg: cfg, closing: make(chan struct{}), pulls: map[uint64]*pull{}, serves: map[uint64]*serve{}, receipts: map[uint64]*receipt{}}
	if s.spin = cfg.Spin; s.spin == 0 {
		s.spin = defaultSpin
	}
	s.frame = frameFor(cfg.Conns)
	seats := seatsFor(cfg.Conns, runtime.NumCPU())
	for i, conn := range cfg.Conns {
		l, err := newLane(s, i, conn, seats[i])
		if err != nil {
			for _, made := range s.lanes {
				made.release()
			}
			for _, left := range cfg.Conns[i:] {
				_ = left.Close() // the caller hears of the other error
			}
			return nil, err
		}
		s.lanes = append(s.lanes, l)
	}
	for _, l := range s.lanes {
		s.workers.Add(2)
		go l.receiveLoop()
		go l.sendLoop()
	}
	return s, nil
}

// Close ends every operation with cause, drops every lease and waits for the session's goroutines. It may be called more than once.
func (s *Session) Close(cause error) {
	s.shut(cause, nil)
	s.workers.Wait()
	s.breaks.Wait()
	s.release.Do(func() {
		for _, l := range s.lanes {
			l.release()
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, b := range s.buffers {
			_ = b.Free() // an munmap of our own mapping fails only for a wrong address, which NewBuffer never gave
		}
		s.buffers = nil
	})
}

// shut takes the session out of service: no new operation starts, all connections end, all operations fail with cause. They leave the
// tables when they have let go, as at any other time. Where this call is the first it tells broken, if anybody.
func (s *Session) shut(cause error, broken func(error)) {
	s.mu.Lock()
	if s.cause != nil {
		s.mu.Unlock()
		return
	}
	s.cause = cause
	close(s.closing)
	pulls, serves := maps.Clone(s.pulls), slices.Collect(maps.Values(s.serves))
	receipts := slices.Collect(maps.Values(s.receipts))
	if broken != nil {
		s.breaks.Add(1) // under mu: a Close that comes second waits for it
	}
	s.mu.Unlock()
	if broken != nil { // before any call ends: who links again because of that finds the link dead
		broken(cause)
		s.breaks.Done()
	}
	for _, l := range s.lanes {
		l.conn.Shutdown()
	}
	for id, p := range pulls {
		p.endAs(id, cause)
	}
	for _, v := range serves {
		v.abandon()
	}
	for _, r := range receipts {
		r.cancel(cause)
	}
}

// broke is how a lane reports that its connection has failed.
func (s *Session) broke(err error) {
	cause := err
	if errors.Is(err, io.EOF) {
		err = errors.New("it closed the connection")
	}
	var e *status.Error
	if !errors.As(cause, &e) {
		cause = status.Newf(status.Failed, status.StageTransfer, "peer died or unlinked: %w", err)
	}
	s.shut(cause, s.cfg.Broken)
}

// Idle returns a channel that is closed as soon as no operation, own or served, is under way.
func (s *Session) Idle() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle == nil {
		s.idle = make(chan struct{})
	}
	idle := s.idle
	s.wakeIdle()
	return idle
}

// wakeIdle tells who waits for an idle session. The caller holds mu.
func (s *Session) wakeIdle() {
	if len(s.pulls)+len(s.serves)+len(s.receipts) > 0 {
		return
	}
	if s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// newBuffer makes every buffer of the package; its tests replace it, to see that each is freed.
var newBuffer = mem.NewBuffer

// smallBuffer is the size of the recycled frame buffers: a request for 500 blocks, or any other frame without a body.
const smallBuffer = 4096

// frame is a control frame on its way out: anything but data.
type frame struct {
	kind      frameKind
	operation uint64
	buffer    *mem.Buffer
	bytes     int
}

// newFrame returns a frame with its header written and room for length bytes of body.
func (s *Session) newFrame(h header) (frame, []byte, error) {
	bytes := headerBytes + int(h.length)
	buffer, err := s.takeBuffer(bytes)
	if err != nil {
		return frame{}, nil, err
	}
	b := buffer.Bytes()[:bytes]
	h.put(b)
	return frame{h.kind, h.operation, buffer, bytes}, b[headerBytes:], nil
}

func (s *Session) takeBuffer(bytes int) (*mem.Buffer, error) {
	if bytes <= smallBuffer {
		s.mu.Lock()
		if n := len(s.buffers); n > 0 {
			b := s.buffers[n-1]
			s.buffers = s.buffers[:n-1]
			s.mu.Unlock()
			return b, nil
		}
		s.mu.Unlock()
		bytes = smallBuffer
	}
	return newBuffer(bytes)
}

// spareBuffers bounds what an idle link keeps.
const spareBuffers = 4

func (s *Session) putBuffer(b *mem.Buffer) {
	if len(b.Bytes()) == smallBuffer {
		s.mu.Lock()
		if s.cause == nil && len(s.buffers) < spareBuffers {
			s.buffers = append(s.buffers, b)
			s.mu.Unlock()
			return
		}
		s.mu.Unlock()
	}
	_ = b.Free() // see Close
}

// tell sends a frame without a body, such as CANCEL or DONE, on a lane. A session that has ended has nobody to tell.
func (s *Session) tell(l *lane, h header) {
	f, _, err := s.newFrame(h)
	if err != nil {
		s.broke(err)
		return
	}
	l.enqueue(f)
}
