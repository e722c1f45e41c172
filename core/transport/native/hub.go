// SPDX-License-Identifier: Apache-2.0

package native

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Hub is an engine's object of the library, which the sessions of all its links share. Its methods may be called from many goroutines.
//
// A call of the library can't be called off. Each one that may take long is made on a goroutine of its own, which the hub counts: it may
// outlive who has asked for it.
type Hub struct {
	library Library
	calls   sync.WaitGroup // of the library, and what comes after them

	mu     sync.Mutex // guards what follows
	closed bool
	ends   map[uint64]*end
}

// NewHub takes the library's object over.
func NewHub(library Library) *Hub { return &Hub{library: library, ends: map[uint64]*end{}} }

// Name and Port are what peers have to know, see Library.
func (h *Hub) Name() uint64 { return h.library.Name() }

// Port returns where peers' objects link to.
func (h *Hub) Port() uint16 { return h.library.Port() }

// Register makes a cache known to the library and returns its name there.
func (h *Hub) Register(shape plan.Shape, onDevice bool, addrs []uintptr) (int64, error) {
	return h.library.Register(shape, onDevice, addrs)
}

// Unregister takes back what Register has made. After Close nothing is left to take back.
func (h *Hub) Unregister(id int64) error {
	h.mu.Lock()
	closed := h.closed
	h.mu.Unlock()
	if closed {
		return nil
	}
	return h.library.Unregister(id)
}

var errClosed = status.New(status.Failed, status.StageCheck, "the engine is finalized")

// Close ends the object when the calls of the library that are under way have returned. It waits for that for at most patience, and returns
// false where they have not: they then go on, and so does the object, until they have.
func (h *Hub) Close(patience time.Duration) bool {
	h.mu.Lock()
	again := h.closed
	h.closed = true
	h.mu.Unlock()
	if again {
		return true
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		h.calls.Wait()
		_ = h.library.Close() // it ends the object whatever it says, and nobody is left to do something about it
	}()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-ended:
		return true
	case <-timer.C:
		return false
	}
}

// begin makes a call on a goroutine of its own.
func (h *Hub) begin(call func() error) *underway {
	u := &underway{done: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		u.err = errClosed
		close(u.done)
		return u
	}
	h.calls.Go(func() {
		defer close(u.done)
		u.err = call()
	})
	return u
}

// underway is a call that was begun.
type underway struct {
	done chan struct{} // closed when it has returned
	err  error         // of the call, after that
}

// lateness is how long a call may return after the caller's deadline and still be waited for: the library has a deadline of its own, which
// begins a moment after ours.
const lateness = 100 * time.Millisecond

// returned waits until the call has returned, or ctx has ended and lateness has passed: false.
func (u *underway) returned(ctx context.Context) bool {
	select {
	case <-u.done:
		return true
	case <-ctx.Done():
	}
	timer := time.NewTimer(lateness)
	defer timer.Stop()
	select {
	case <-u.done:
		return true
	case <-timer.C:
		return false
	}
}

// end is this object's end of the library's link to one peer's object. It outlives a session for which another one takes its place.
type end struct {
	hub  *Hub
	peer uint64
	// turn has one token, for who calls the library about this link: it lets transfers over a link wait for each other anyway, and none may
	// be beside the making of the link.
	turn chan struct{}
	said atomic.Pointer[string] // of the link, for explain

	sessions int // guarded by hub.mu

	// Of who has the token:
	suspect bool      // it has failed, or was dropped: to be made anew before it is used
	refused error     // why it can't be made; nil: it can, as far as is known
	again   time.Time // when to try nevertheless
}

// join returns the end of the link to a peer's object, for one session more.
func (h *Hub) join(peer uint64) *end {
	h.mu.Lock()
	defer h.mu.Unlock()
	e := h.ends[peer]
	if e == nil {
		e = &end{hub: h, peer: peer, turn: make(chan struct{}, 1)}
		e.turn <- struct{}{}
		e.say("not used yet")
		h.ends[peer] = e
	}
	e.sessions++
	return e
}

// leave drops the link when no session is left, after tidy and as soon as the library lets go of it, and waits a moment for that.
func (e *end) leave(tidy func()) {
	h := e.hub
	h.mu.Lock()
	e.sessions--
	h.mu.Unlock()
	dropped := h.begin(func() error {
		<-e.turn
		defer e.pass()
		tidy()
		h.mu.Lock()
		last := e.sessions == 0 && h.ends[e.peer] == e
		h.mu.Unlock()
		if !last {
			return nil
		}
		err := h.library.Unlink(e.peer)
		e.suspect = true // for who has joined meanwhile, and waits for the token
		h.mu.Lock()
		defer h.mu.Unlock()
		if e.sessions == 0 {
			delete(h.ends, e.peer)
		}
		return err
	})
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	dropped.returned(ended)
}

// take waits for the token, which pass gives back.
func (e *end) take(ctx context.Context) error {
	select {
	case <-e.turn:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (e *end) pass() { e.turn <- struct{}{} }

func (e *end) say(what string) { e.said.Store(&what) }

// errUnlinked says that there is no link of the library's, and that none can be made now.
var errUnlinked = errors.New("the vendor's library has no link to the peer")
