// SPDX-License-Identifier: Apache-2.0

package fabric

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// firstEphemeral is where Linux begins to give ports to those who ask for none.
const firstEphemeral = 32768

// directChunk bounds what a direct read copies while it holds the network: no copy keeps others waiting for long (1 MiB, as everywhere).
const directChunk = 1 << 20

// Host stands for one process with an address of its own. Its methods may be called from many goroutines.
type Host struct {
	network *Network
	name    string
	address netip.Addr

	// Guarded by the network's lock.
	listeners []*listener
	ephemeral uint16
	paused    bool
	dead      bool
	life      uint64 // bytes that the host may still send before it dies; 0: no limit
	lives     uint64 // lives drawn so far
	fault     func(mem.Span) bool
}

// Name returns the name that the host was made with.
func (h *Host) Name() string { return h.name }

// IP returns the host's address, without a port.
func (h *Host) IP() string { return h.address.String() }

// Listen listens on "ip:port". The address is the host's own, 127.0.0.1 (for dials of this host only) or 0.0.0.0; port 0 takes a
// free one. It fails with EADDRINUSE and EADDRNOTAVAIL as the system does.
func (h *Host) Listen(address string) (net.Listener, error) {
	at, err := parse(address)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: networkName, Err: err}
	}
	n := h.network
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := h.bindable(at); err != nil {
		return nil, &net.OpError{Op: "listen", Net: networkName, Addr: net.TCPAddrFromAddrPort(at), Err: err}
	}
	if at.Port() == 0 {
		at = netip.AddrPortFrom(at.Addr(), h.freePort())
	}
	l := &listener{host: h, at: at, cond: sync.NewCond(&n.mu)}
	h.listeners = append(h.listeners, l)
	n.listeners[l] = struct{}{}
	return l, nil
}

// Dial connects to "ip:port" from source: "ip", "ip:port", or "" for the host's own address and a free port. It takes two latencies,
// is refused (ECONNREFUSED) where nobody listens, waits while the two hosts are partitioned, and ends when ctx ends.
func (h *Host) Dial(ctx context.Context, source, address string) (net.Conn, error) {
	to, err := parse(address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: networkName, Err: err}
	}
	n := h.network
	n.mu.Lock()
	defer n.mu.Unlock()
	e, err := h.dial(ctx, source, to)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: networkName, Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	return &conn{end: e}, nil
}

// Data takes over a connection of this host as a data connection; where it returns an error it has closed it. From then on c fails as
// a closed one, and closing it does nothing. What was received and not read yet is not lost.
func (h *Host) Data(c net.Conn) (transport.Conn, error) {
	own, ok := c.(*conn)
	if !ok || own.end.host != h {
		_ = c.Close() // the caller hears of the other error
		return nil, fmt.Errorf("taking over a %T: not a connection of this host", c)
	}
	defer own.lock()()
	if own.taken || own.end.released {
		return nil, fmt.Errorf("taking over a connection: %w", net.ErrClosed)
	}
	own.taken = true
	own.end.connection.alarm.cond.Broadcast() // a call that waits on c ends
	return &stream{end: own.end}, nil
}

// Kill is the death of the process: peers see ECONNRESET and lose what was under way, dials are refused, and everything that the
// host's own code still calls fails as closed. Network.Host with the same name then starts a replacement at the same address.
func (h *Host) Kill() {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.kill(reset)
}

// KillAfter kills the host as soon as it has sent this many more bytes, on all connections together. What it sent before arrives at
// its peers, then ECONNRESET. 0 takes an earlier call back.
func (h *Host) KillAfter(bytes uint64) {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.life = bytes
}

// KillWithin is KillAfter with a number that is drawn from the network's seed, from 1 to bytes. It returns the number.
func (h *Host) KillWithin(bytes uint64) uint64 {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.lives++
	h.life = draw(h.network.random(pair{a: h.name}, h.lives, "life"), max(bytes, 1))
	return h.life
}

// Pause is SIGSTOP as the network sees it: the host receives, accepts, dials and sends nothing, and sees no peer end. Connections
// stay; peers can send until buffers are full, and their dials succeed and wait to be accepted.
func (h *Host) Pause() {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.paused = true
}

// Resume ends a pause.
func (h *Host) Resume() {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.paused = false
	h.network.wakeAll()
}

// FaultSpans makes memory inaccessible to this host's data connections and direct reads: they answer EFAULT at the first span for
// which the hook returns true, after the bytes before it. The hook sees spans as the caller passed them. nil makes all accessible.
func (h *Host) FaultSpans(hook func(mem.Span) bool) {
	h.network.mu.Lock()
	defer h.network.mu.Unlock()
	h.fault = hook
}

// ReadDirect copies from the memory of a peer without the peer's code taking part, as shared memory and RDMA do. It takes two
// latencies and the time that BytesPerSecond asks for. A paused peer can be read. It fails with ESRCH where the peer is dead or dies
// meanwhile, EHOSTUNREACH where the two are partitioned, EFAULT at a span that [Host.FaultSpans] of either names, and
// [net.ErrClosed] where the host itself is dead; what was copied before that stays.
func (h *Host) ReadDirect(peer *Host, moves []mem.Move) error {
	n := h.network
	if peer.network != n {
		return fmt.Errorf("reading the memory of %s: not a host of this network", peer.name)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := h.readDirect(peer, moves); err != nil {
		return fmt.Errorf("reading the memory of %s: %w", peer.name, err)
	}
	return nil
}

func (h *Host) readDirect(peer *Host, moves []mem.Move) error {
	n := h.network
	own, theirs := h.fault, peer.fault
	if err := h.reach(peer, moves); err != nil {
		return err
	}
	for _, m := range moves {
		n.mu.Unlock() // the hooks are the caller's code
		fault := faulted(own, m.Dst, m.Bytes) || faulted(theirs, m.Src, m.Bytes)
		n.mu.Lock()
		if fault {
			return syscall.EFAULT
		}
		for done := uint64(0); done < m.Bytes; done += directChunk {
			if err := h.direct(peer); err != nil {
				return err
			}
			at := uintptr(done)
			chunk := mem.Move{Dst: m.Dst + at, Src: m.Src + at, Bytes: min(m.Bytes-done, directChunk)}
			err := mem.CopyDirect([]mem.Move{chunk}, 1)
			n.mu.Unlock() // let others in between chunks
			n.mu.Lock()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

func faulted(hook func(mem.Span) bool, addr uintptr, bytes uint64) bool {
	return hook != nil && bytes > 0 && hook(mem.Span{Addr: addr, Bytes: bytes})
}

// reach waits for as long as a direct read takes.
func (h *Host) reach(peer *Host, moves []mem.Move) error {
	f := h.network.between(h, peer)
	delay := 2 * f.Latency
	if f.BytesPerSecond > 0 {
		bytes := 0.0
		for _, m := range moves {
			bytes += float64(m.Bytes)
		}
		delay += time.Duration(bytes / float64(f.BytesPerSecond) * float64(time.Second))
	}
	by := time.Now().Add(delay)
	for {
		if err := h.direct(peer); err != nil {
			return err
		}
		left := time.Now().Before(by)
		if !h.paused && !left {
			return nil
		}
		if !left {
			by = time.Time{}
		}
		h.network.changed.wait(by)
	}
}

// direct says why the peer's memory can't be read now.
func (h *Host) direct(peer *Host) error {
	switch {
	case h.dead || h.network.closed:
		return net.ErrClosed
	case h.network.blocked(h, peer):
		return syscall.EHOSTUNREACH
	case peer.dead:
		return syscall.ESRCH
	}
	return nil
}

func (h *Host) dial(ctx context.Context, source string, to netip.AddrPort) (*end, error) {
	n := h.network
	from, err := h.source(source, to)
	if err != nil {
		return nil, err
	}
	peer := h.at(to.Addr())
	if peer == nil {
		return nil, syscall.ECONNREFUSED
	}
	between := pair{h.name, peer.name}
	index := n.dials[between]
	n.dials[between]++
	f := n.between(h, peer)
	chance := n.random(between, index, "dial")
	delay := 2 * f.Latency
	if f.Jitter > 0 {
		delay += time.Duration(chance.Int64N(int64(f.Jitter)))
	}
	l, err := h.rendezvous(ctx, to, time.Now().Add(delay))
	if err != nil {
		return nil, err
	}
	if f.Refuse > 0 && chance.Float64() < f.Refuse {
		return nil, syscall.ECONNREFUSED
	}
	c := connect(index, h, l.host, from, to)
	l.backlog = append(l.backlog, c.ends[1])
	l.cond.Signal()
	return c.ends[0], nil
}

// rendezvous waits until the handshake with whoever has an address is through, and returns who listens there then.
func (h *Host) rendezvous(ctx context.Context, to netip.AddrPort, by time.Time) (*listener, error) {
	n := h.network
	defer n.changed.watch(ctx)()
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if n.closed || h.dead {
			return nil, net.ErrClosed
		}
		left := time.Now().Before(by)
		if peer := h.at(to.Addr()); !left && !h.paused && !n.blocked(h, peer) {
			l := peer.listening(to)
			if l == nil {
				return nil, syscall.ECONNREFUSED
			}
			if len(l.backlog) < backlogLimit {
				return l, nil
			}
		}
		if !left {
			by = time.Time{}
		}
		n.changed.wait(by)
	}
}

// at returns the host that an address means to this one, or nil.
func (h *Host) at(ip netip.Addr) *Host {
	if ip.IsLoopback() || ip.IsUnspecified() || ip == h.address {
		return h.network.hosts[h.name]
	}
	return h.network.addresses[ip]
}

// listening returns who listens at an address of the host, or nil.
func (h *Host) listening(to netip.AddrPort) *listener {
	for _, l := range h.listeners {
		if l.at.Port() == to.Port() && (l.at.Addr() == to.Addr() || l.at.Addr().IsUnspecified()) {
			return l
		}
	}
	return nil
}

// source returns where a dial comes from.
func (h *Host) source(source string, to netip.AddrPort) (netip.AddrPort, error) {
	own := h.address
	if to.Addr().IsLoopback() {
		own = to.Addr()
	}
	from := netip.AddrPortFrom(own, 0)
	if source != "" {
		if _, _, err := net.SplitHostPort(source); err != nil {
			source = net.JoinHostPort(source, "0")
		}
		asked, err := parse(source)
		if err != nil {
			return from, err
		}
		if err := h.bindable(asked); err != nil {
			return from, err
		}
		if !asked.Addr().IsUnspecified() {
			own = asked.Addr()
		}
		from = netip.AddrPortFrom(own, asked.Port())
	}
	if from.Port() == 0 {
		from = netip.AddrPortFrom(from.Addr(), h.freePort())
	}
	return from, nil
}

// bindable says why the host's own side can't have an address.
func (h *Host) bindable(at netip.AddrPort) error {
	ip := at.Addr()
	switch {
	case h.network.closed || h.dead:
		return net.ErrClosed
	case ip != h.address && !ip.IsLoopback() && !ip.IsUnspecified():
		return syscall.EADDRNOTAVAIL
	}
	for _, l := range h.listeners {
		same := l.at.Addr() == ip || l.at.Addr().IsUnspecified() || ip.IsUnspecified()
		if same && l.at.Port() == at.Port() {
			return syscall.EADDRINUSE
		}
	}
	return nil
}

// freePort returns the next port on which the host does not listen.
func (h *Host) freePort() uint16 {
	for {
		port := h.ephemeral
		h.ephemeral = max(h.ephemeral+1, firstEphemeral) // 65535 + 1 is 0
		if !slices.ContainsFunc(h.listeners, func(l *listener) bool { return l.at.Port() == port }) {
			return port
		}
	}
}

// lifeLeft shortens a send to what the host lives to see.
func (h *Host) lifeLeft(n uint64) uint64 {
	if h.life > 0 {
		return min(n, h.life)
	}
	return n
}

// live counts bytes sent.
func (h *Host) live(n uint64) {
	if h.life == 0 || n == 0 {
		return
	}
	h.life -= n
	if h.life == 0 {
		h.kill(severed)
	}
}

// kill closes everything of the host; its peers' ends suffer a fate.
func (h *Host) kill(f fate) {
	if h.dead {
		return
	}
	h.dead = true
	for _, l := range slices.Clone(h.listeners) {
		l.shut()
	}
	h.endProofs()
	for c := range h.network.connections {
		for _, e := range c.ends {
			if e.host == h {
				e.release()
				e.peer.suffer(f)
			}
		}
	}
	h.network.wakeAll()
}

// listener is a net.Listener of a host.
type listener struct {
	host    *Host
	at      netip.AddrPort
	cond    *sync.Cond
	backlog []*end
	closed  bool
}

// Accept waits for a dial.
func (l *listener) Accept() (net.Conn, error) {
	n := l.host.network
	n.mu.Lock()
	defer n.mu.Unlock()
	for !l.closed && (len(l.backlog) == 0 || l.host.paused) {
		l.cond.Wait()
	}
	if l.closed {
		return nil, &net.OpError{Op: "accept", Net: networkName, Addr: l.Addr(), Err: net.ErrClosed}
	}
	e := l.backlog[0]
	l.backlog = l.backlog[1:]
	n.changed.cond.Broadcast() // somebody may wait for a place
	return &conn{end: e}, nil
}

// Close ends Accept and resets the connections that nobody has accepted.
func (l *listener) Close() error {
	l.host.network.mu.Lock()
	defer l.host.network.mu.Unlock()
	if l.closed {
		return &net.OpError{Op: "close", Net: networkName, Addr: l.Addr(), Err: net.ErrClosed}
	}
	l.shut()
	return nil
}

// Addr returns the bound address.
func (l *listener) Addr() net.Addr { return net.TCPAddrFromAddrPort(l.at) }

func (l *listener) shut() {
	l.closed = true
	for _, e := range l.backlog {
		e.release()
		e.peer.suffer(reset)
	}
	l.backlog = nil
	h := l.host
	h.listeners = slices.DeleteFunc(h.listeners, func(other *listener) bool { return other == l })
	delete(h.network.listeners, l)
	l.cond.Broadcast()
	h.network.changed.cond.Broadcast() // who waits for a place is refused
}

// parse reads "ip:port"; an empty ip is 0.0.0.0.
func parse(address string) (netip.AddrPort, error) {
	host, number, err := net.SplitHostPort(address)
	if err != nil {
		return netip.AddrPort{}, err
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		return netip.AddrPort{}, &net.AddrError{Err: "invalid port", Addr: address}
	}
	ip := netip.IPv4Unspecified()
	if host != "" {
		if ip, err = netip.ParseAddr(host); err != nil {
			return netip.AddrPort{}, &net.AddrError{Err: "not an IP address", Addr: address}
		}
	}
	return netip.AddrPortFrom(ip.Unmap(), uint16(port)), nil
}
