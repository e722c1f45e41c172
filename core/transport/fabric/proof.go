// SPDX-License-Identifier: Apache-2.0

package fabric

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

// A proof of a shared host, as core/link has one over Unix sockets, between any two hosts of a network: they all live in one process.
// The types have the shape of link's, which this package does not import.

// Bounds of a gift, the same as over a Unix socket.
const (
	maxGiftBytes = 1 << 10
	maxGiftFDs   = 8
)

// Gift is what one host hands to another with a proof: at most 1 KiB and 8 descriptors of this process.
type Gift struct {
	Bytes []byte
	FDs   []int
}

// Descriptors is told of every descriptor that waits in a [Witness]. Its functions may be nil.
type Descriptors struct {
	Track, Untrack func(fd int)
}

// Door answers those who reach for its token.
type Door struct {
	host  *Host
	token [16]byte
	fds   Descriptors
	give  func() (Gift, error) // or nil

	// Guarded by the network's lock.
	expected map[[16]byte]*visit // by nonce
	closed   bool
}

// visit is what is known of the host that is expected with a nonce. Guarded by the network's lock.
type visit struct {
	witness *Witness
	taken   bool // somebody is on the way in
}

var errNotExpected = errors.New("the door does not expect the nonce")

// OpenDoor starts to answer for token. gift makes what is handed to each host that comes; nil: nothing is. The descriptors that it
// makes are passed on as they are, and become the taker's.
func (h *Host) OpenDoor(token [16]byte, fds Descriptors, gift func() (Gift, error)) (*Door, error) {
	n := h.network
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.closed || h.dead:
		return nil, fmt.Errorf("opening a door: %w", net.ErrClosed)
	case n.doors[token] != nil:
		return nil, fmt.Errorf("opening a door: %w", syscall.EADDRINUSE)
	}
	d := &Door{host: h, token: token, fds: fds, give: gift, expected: make(map[[16]byte]*visit)}
	n.doors[token] = d
	return d, nil
}

// Expect lets in one host that shows nonce. The function that it returns ends that and returns the witness of who came, or an error;
// it is called exactly once.
func (d *Door) Expect(nonce [16]byte) (claim func() (*Witness, error)) {
	mu := &d.host.network.mu
	mu.Lock()
	defer mu.Unlock()
	v := &visit{}
	d.expected[nonce] = v
	return func() (*Witness, error) {
		mu.Lock()
		defer mu.Unlock()
		delete(d.expected, nonce)
		if v.witness == nil {
			return nil, errors.New("peer did not reach our door")
		}
		return v.witness, nil
	}
}

// Close stops answering. Witnesses that were claimed live on.
func (d *Door) Close() error {
	mu := &d.host.network.mu
	mu.Lock()
	defer mu.Unlock()
	if d.closed {
		return net.ErrClosed
	}
	d.shut()
	return nil
}

func (d *Door) shut() {
	d.closed = true
	delete(d.host.network.doors, d.token)
	d.host.network.changed.cond.Broadcast() // who is on the way to it is refused
}

// ReachDoor shows nonce at the door of token and returns the witness of the host behind it. It takes two latencies, waits while one
// of the two is paused or they are partitioned, fails with ECONNREFUSED where there is no such door, and ends when ctx ends. gift is as
// for OpenDoor; where one of the two fails, the proof goes on without it, and [Witness.Withheld] says so.
func (h *Host) ReachDoor(ctx context.Context, token, nonce [16]byte, fds Descriptors, gift func() (Gift, error)) (*Witness, error) {
	w, err := h.reachDoor(ctx, token, nonce, fds, gift)
	if err != nil {
		return nil, fmt.Errorf("reaching a door: %w", err)
	}
	return w, nil
}

func (h *Host) reachDoor(ctx context.Context, token, nonce [16]byte, fds Descriptors, gift func() (Gift, error)) (*Witness, error) {
	n := h.network
	n.mu.Lock()
	defer n.mu.Unlock()
	d, err := h.approach(ctx, token)
	if err != nil {
		return nil, err
	}
	v := d.expected[nonce]
	if v == nil || v.taken {
		return nil, errNotExpected
	}
	v.taken = true
	a := &Witness{host: h, fds: fds, dead: make(chan struct{})}
	b := &Witness{host: d.host, fds: d.fds, dead: make(chan struct{})}
	a.peer, b.peer = b, a
	n.mu.Unlock() // the gifts are the caller's code
	b.gift, a.withheld = wrap(gift, b.fds)
	a.gift, b.withheld = wrap(d.give, a.fds)
	n.mu.Lock()
	if d.closed || h.dead || d.expected[nonce] != v {
		n.mu.Unlock()
		a.gift.close(a.fds)
		b.gift.close(b.fds)
		n.mu.Lock()
		return nil, syscall.ECONNRESET
	}
	n.witnesses[a], n.witnesses[b] = struct{}{}, struct{}{}
	v.witness = b
	return a, nil
}

// approach waits until the way to the door of token is made, and returns the door.
func (h *Host) approach(ctx context.Context, token [16]byte) (*Door, error) {
	n := h.network
	defer n.changed.watch(ctx)()
	began := time.Now()
	for {
		d := n.doors[token]
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case n.closed || h.dead:
			return nil, net.ErrClosed
		case d == nil:
			return nil, syscall.ECONNREFUSED
		}
		by := began.Add(2 * n.between(h, d.host).Latency)
		left := time.Now().Before(by)
		if !left && !h.paused && !d.host.paused && !n.blocked(h, d.host) {
			return d, nil
		}
		if !left {
			by = time.Time{}
		}
		n.changed.wait(by)
	}
}

// wrap makes a gift and enters its descriptors into the table of who gets it. Beside an error it is empty.
func wrap(gift func() (Gift, error), taker Descriptors) (Gift, error) {
	if gift == nil {
		return Gift{}, nil
	}
	g, err := gift()
	taker.each(taker.Track, g)
	if err == nil && (len(g.Bytes) > maxGiftBytes || len(g.FDs) > maxGiftFDs) {
		err = fmt.Errorf("a gift of %d bytes and %d descriptors", len(g.Bytes), len(g.FDs))
	}
	if err != nil {
		g.close(taker)
		return Gift{}, err
	}
	return g, nil
}

func (g Gift) close(fds Descriptors) {
	fds.each(fds.Untrack, g)
	for _, fd := range g.FDs {
		_ = syscall.Close(fd)
	}
}

func (Descriptors) each(tell func(fd int), g Gift) {
	if tell == nil {
		return
	}
	for _, fd := range g.FDs {
		tell(fd)
	}
}

// Witness watches over the host at the other end of a proof, and keeps what that one handed over.
type Witness struct {
	host     *Host
	fds      Descriptors
	withheld error

	// Guarded by the network's lock.
	peer   *Witness
	gift   Gift
	dead   chan struct{}
	isDead bool
}

// Dead is closed when the other host was killed, or has let go of its end.
func (w *Witness) Dead() <-chan struct{} { return w.dead }

// Pid returns the number of this process: hosts are not processes of their own.
func (w *Witness) Pid() int { return os.Getpid() }

// Withheld says why our own gift was not handed over; nil where it was, or where there was none.
func (w *Witness) Withheld() error { return w.withheld }

// Take returns what the other host handed over, and passes its descriptors on; later calls return nothing.
func (w *Witness) Take() Gift {
	gift := w.empty()
	w.fds.each(w.fds.Untrack, gift)
	return gift
}

// Close lets go, which the other end sees, and closes the descriptors that nobody took.
func (w *Witness) Close() {
	w.empty().close(w.fds)
	mu := &w.host.network.mu
	mu.Lock()
	defer mu.Unlock()
	w.letGo()
}

func (w *Witness) empty() Gift {
	mu := &w.host.network.mu
	mu.Lock()
	defer mu.Unlock()
	gift := w.gift
	w.gift = Gift{}
	return gift
}

// letGo ends this end of the proof.
func (w *Witness) letGo() {
	delete(w.host.network.witnesses, w)
	if !w.peer.isDead {
		w.peer.isDead = true
		close(w.peer.dead)
	}
}

// endProofs is what the death of h means for its doors and for those who watch it.
func (h *Host) endProofs() {
	for _, d := range h.network.doors {
		if d.host == h {
			d.shut()
		}
	}
	for w := range h.network.witnesses {
		if w.host == h {
			w.letGo()
		}
	}
}
