// SPDX-License-Identifier: Apache-2.0

// Package fabric is an in-memory network for two or more engines in one process: hosts, listeners, connections, and faults by seed.
//
// It runs under the real link code and the real framing, for our tests and for the users' own. It owns every byte between the
// sending and the receiving call, and opens no operating-system socket. It never spins, starts no goroutine that lives on, keeps
// nothing global, and blocks only on condition variables and timers, so that a [Network] that is made inside a [testing/synctest]
// bubble runs under virtual time there: hours of latency cost no time at all.
//
// There are three nouns: a Network; its Hosts, each of which stands for one process; and the connections between them, which are
// [net.Conn] until [Host.Data] turns one into a [transport.Conn]. At a [Door] two hosts show each other that they share a machine, and
// hand over descriptors. What goes wrong is said in [Faults] and by the methods Partition, CutAll, Kill and Pause.
//
// Caveats: one lock guards a whole network, which makes it simple and not fast. A paused host stops receiving and sending, but the
// code of its engine goes on. The memory of spans must be mapped; [Host.FaultSpans] is the way to have some that is not accessible.
package fabric

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"
)

const (
	// defaultBuffer is what one direction of a connection holds before its sender waits: about what Linux starts with.
	defaultBuffer = 256 << 10
	// packetBytes is the grain of delays and of loss: the largest packet that Linux hands to a network card.
	packetBytes = 64 << 10
	// retransmit is how late a lost packet is: the least that Linux waits before it sends one again (TCP_RTO_MIN).
	retransmit = 200 * time.Millisecond
	// backlogLimit bounds the connections that wait for Accept; further dials wait. It is the limit that Go asks Linux for by default.
	backlogLimit = 4096
)

// Faults says what goes wrong on connections. The zero value is a network without delay and fault. Everything that is drawn is drawn
// from the network's seed and from the connection alone: the pair of hosts and how many dials there were between them before.
//
// One connection is an ordered stream, so nothing is reordered within it; Jitter and Loss delay each connection of a link on its
// own, which reorders what travels on different connections.
type Faults struct {
	Latency        time.Duration // from send to arrival; a dial takes it twice
	Jitter         time.Duration // added to Latency, drawn for each packet of at most 64 KiB from 0 to less than this
	BytesPerSecond uint64        // rate of one direction of one connection; 0: no limit
	Loss           float64       // share of packets, from 0 to 1, that get lost, are sent again, and so come 200 ms late
	Buffer         uint64        // bytes that one direction holds before its sender waits; 0: 256 KiB
	Tear           uint64        // one call moves at most a drawn number of bytes from 1 to this; 0: as many as it can

	// CutAfter cuts a connection as soon as one direction has carried this many bytes since the dial or, where that is later, since
	// SetFaults. All of these bytes arrive and nothing after them: then both ends see ECONNRESET. What was under way in the other
	// direction is lost. 0: never.
	CutAfter uint64
	// CutWithin is CutAfter with a number that is drawn for each direction of each connection, from 1 to this. 0: never.
	CutWithin uint64
	// Refuse is the share of dials, from 0 to 1, that are refused although somebody listens.
	Refuse float64
}

// Network is a set of hosts that can reach each other. Its methods may be called from many goroutines.
type Network struct {
	seed uint64

	mu          sync.Mutex // guards everything below, and the fields of everything that belongs to the network
	changed     *alarm     // dials and direct reads wait here
	closed      bool
	hosts       map[string]*Host
	addresses   map[netip.Addr]*Host
	given       uint32 // addresses given so far
	connections map[*connection]struct{}
	listeners   map[*listener]struct{}
	doors       map[[16]byte]*Door // by token
	witnesses   map[*Witness]struct{}
	dials       map[pair]uint64 // dials so far, by dialer and listener: the name of a connection for its random numbers
	faults      Faults
	pairFaults  map[pair]Faults
	partitions  map[pair]bool
	carried     uint64
}

// pair names two hosts. Names and not hosts: a host that replaces a dead one lives under the same conditions.
type pair struct{ a, b string }

// unordered is the same for (a, b) and (b, a).
func unordered(a, b *Host) pair {
	return pair{min(a.name, b.name), max(a.name, b.name)}
}

// New makes a network without hosts and without faults. Two networks with the same seed on which the same is done draw the same.
// Used under virtual time it must be made inside the bubble.
func New(seed uint64) *Network {
	n := &Network{
		seed:        seed,
		hosts:       make(map[string]*Host),
		addresses:   make(map[netip.Addr]*Host),
		connections: make(map[*connection]struct{}),
		listeners:   make(map[*listener]struct{}),
		doors:       make(map[[16]byte]*Door),
		witnesses:   make(map[*Witness]struct{}),
		dials:       make(map[pair]uint64),
		pairFaults:  make(map[pair]Faults),
		partitions:  make(map[pair]bool),
	}
	n.changed = newAlarm(&n.mu)
	return n
}

// Host returns the living host of this name and starts one where there is none. A host that is started after the one of the same
// name was killed has its address. A name that is an IP address is the host's address; other hosts get 10.0.0.1 and so on.
func (n *Network) Host(name string) *Host {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.hosts[name]
	if old != nil && !old.dead {
		return old
	}
	h := &Host{network: n, name: name, ephemeral: firstEphemeral}
	if old != nil {
		h.address = old.address
	} else {
		h.address = n.addressFor(name)
	}
	n.hosts[name], n.addresses[h.address] = h, h
	return h
}

func (n *Network) addressFor(name string) netip.Addr {
	if ip, err := netip.ParseAddr(name); err == nil {
		return ip.Unmap()
	}
	for {
		n.given++
		ip := netip.AddrFrom4([4]byte{10, byte(n.given >> 16), byte(n.given >> 8), byte(n.given)})
		if n.addresses[ip] == nil {
			return ip
		}
	}
}

// SetFaults sets the faults between all pairs of hosts that have none of their own, on open connections too.
func (n *Network) SetFaults(f Faults) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.faults = f
	for c := range n.connections {
		if _, own := n.pairFaults[unordered(c.ends[0].host, c.ends[1].host)]; !own {
			c.limit(f)
		}
	}
	n.wakeAll()
}

// SetPairFaults sets the faults between two hosts, in both directions, in place of those of the network.
func (n *Network) SetPairFaults(a, b *Host, f Faults) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pairFaults[unordered(a, b)] = f
	n.eachBetween(a, b, func(c *connection) { c.limit(f) })
	n.wakeAll()
}

// Partition stops everything between two hosts, silently: nothing that has not arrived yet arrives, no end and no reset either, and
// dials wait. Connections stay, and senders go on until their buffer is full.
func (n *Network) Partition(a, b *Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.eachBetween(a, b, (*connection).settle) // what arrives up to now has arrived
	n.partitions[unordered(a, b)] = true
}

// Heal ends a partition. What was held back, resets too, arrives at once or after what is left of its delay.
func (n *Network) Heal(a, b *Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.partitions, unordered(a, b))
	n.wakeAll()
}

// CutAll resets every open connection at both ends: what is under way is lost. Listeners stay.
func (n *Network) CutAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for c := range n.connections {
		c.cut()
	}
}

// Cut resets the open connections between two hosts, as CutAll.
func (n *Network) Cut(a, b *Host) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.eachBetween(a, b, (*connection).cut)
}

// Stats is what a network holds and has done.
type Stats struct {
	Open      int    // ends of connections that nobody has closed yet: 0 where nothing leaks
	Listeners int    // open listeners
	Proofs    int    // open doors, and witnesses that nobody has closed yet
	Dials     uint64 // dials that reached a host, refused ones too
	Bytes     uint64 // bytes accepted from senders
}

// Stats counts. A killed host holds nothing; what Network.Close shut counts until its owner has closed it.
func (n *Network) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := Stats{Listeners: len(n.listeners), Proofs: len(n.doors) + len(n.witnesses), Bytes: n.carried}
	for c := range n.connections {
		for _, e := range c.ends {
			if !e.released {
				s.Open++
			}
		}
	}
	for _, count := range n.dials {
		s.Dials += count
	}
	return s
}

// Close ends every connection, listener and proof, and makes every call on them return, now and later. A second Close does nothing.
func (n *Network) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for l := range n.listeners {
		l.shut()
	}
	for _, d := range n.doors {
		d.shut()
	}
	for w := range n.witnesses {
		w.letGo()
	}
	for c := range n.connections {
		for _, e := range c.ends {
			e.shut = true
			e.in.drop()
		}
		c.alarm.stop()
	}
	n.changed.stop()
}

// between returns the faults of two hosts.
func (n *Network) between(a, b *Host) Faults {
	if f, ok := n.pairFaults[unordered(a, b)]; ok {
		return f
	}
	return n.faults
}

func (n *Network) blocked(a, b *Host) bool {
	return len(n.partitions) > 0 && n.partitions[unordered(a, b)]
}

func (n *Network) eachBetween(a, b *Host, f func(*connection)) {
	for c := range n.connections {
		if unordered(c.ends[0].host, c.ends[1].host) == unordered(a, b) {
			f(c)
		}
	}
}

// wakeAll makes every waiting call look again.
func (n *Network) wakeAll() {
	n.changed.cond.Broadcast()
	for l := range n.listeners {
		l.cond.Broadcast()
	}
	for c := range n.connections {
		c.alarm.cond.Broadcast()
	}
}

// random returns the numbers of one use (purpose) of one dial: independent of every other one, and of the order of calls elsewhere.
func (n *Network) random(dial pair, index uint64, purpose string) *rand.Rand {
	h := fnv.New64a()
	_, _ = fmt.Fprintf(h, "%q %q %d %s", dial.a, dial.b, index, purpose) // a hash never fails
	return rand.New(rand.NewPCG(n.seed, h.Sum64()))
}

// draw returns a number from 1 to most.
func draw(r *rand.Rand, most uint64) uint64 { return 1 + r.Uint64N(most) }

// alarm is a condition variable with a clock: its waiters are woken by a broadcast and at the earliest time that one of them named.
// Every one of them then looks for itself whether it is due and names its time again.
type alarm struct {
	cond  *sync.Cond
	timer *time.Timer
	due   time.Time // when the timer fires; zero: it is not set
}

func newAlarm(mu *sync.Mutex) *alarm { return &alarm{cond: sync.NewCond(mu)} }

// wait waits until something changes, at most until a time; the zero time stands for no limit.
func (a *alarm) wait(until time.Time) {
	if !until.IsZero() && (a.due.IsZero() || until.Before(a.due)) {
		a.due = until
		if a.timer == nil {
			a.timer = time.AfterFunc(time.Until(until), a.ring)
		} else {
			a.timer.Reset(time.Until(until))
		}
	}
	a.cond.Wait()
}

func (a *alarm) ring() {
	a.cond.L.Lock()
	defer a.cond.L.Unlock()
	a.due = time.Time{}
	a.cond.Broadcast()
}

// stop wakes the waiters for the last time.
func (a *alarm) stop() {
	if a.timer != nil {
		a.timer.Stop()
	}
	a.due = time.Time{}
	a.cond.Broadcast()
}

// earliest returns the earlier of two times, of which the zero time is no time.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || (!b.IsZero() && b.Before(a)) {
		return b
	}
	return a
}

// watch wakes the waiters when ctx ends. The caller calls what it returns.
func (a *alarm) watch(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() {
		a.cond.L.Lock()
		defer a.cond.L.Unlock()
		a.cond.Broadcast()
	})
}
