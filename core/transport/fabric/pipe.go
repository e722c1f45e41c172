// SPDX-License-Identifier: Apache-2.0

package fabric

import (
	"io"
	"math/rand/v2"
	"net/netip"
	"syscall"
	"time"
)

// connection is two ends and a stream of bytes in each direction.
type connection struct {
	network *Network
	ends    [2]*end // the dialer's, the listener's
	alarm   *alarm  // every call on either end waits here
}

// fate is what has happened to an end from outside.
type fate uint8

const (
	whole   fate = iota
	severed      // cut or dead behind a last byte: what was sent before arrives, then ECONNRESET
	reset        // ECONNRESET at once: what was under way is lost
)

// end is one host's side of a connection.
type end struct {
	connection    *connection
	host          *Host
	peer          *end
	local, remote netip.AddrPort
	in, out       *pipe // in is the peer's out

	fate     fate
	shut     bool // Close or Shutdown was called here, or the host is dead
	finished bool // CloseWrite was called, or shut
	released bool // the owner has closed it
}

// pipe is one direction: the bytes that were sent and not read yet.
type pipe struct {
	from, to *end
	queue    ring
	packets  []packet // what has not arrived yet
	arrived  uint64   // stream offset up to which bytes have arrived
	read     uint64   // stream offset of the next byte to read
	written  uint64   // stream offset of the next byte to write
	ended    bool     // the sender's end has arrived: io.EOF after the last byte

	lastDue  time.Time // arrival of the newest packet: nothing overtakes it
	lineFree time.Time // when the line has sent what it was given, at BytesPerSecond
	posted   uint64    // stream offset behind the newest packet
	cutAt    uint64    // stream offset at which the connection is cut; 0: never

	// Offsets, and not calls, are what calls are torn at: where the pieces end does not depend on who comes first.
	readTear, writeTear uint64
	readRandom          *rand.Rand
	writeRandom         *rand.Rand
	delayRandom         *rand.Rand
	cutRandom           *rand.Rand
}

// packet is a run of bytes that arrives together.
type packet struct {
	end uint64 // stream offset behind its last byte
	due time.Time
	fin bool // nothing comes after it
}

// connect makes the index-th connection between two hosts.
func connect(index uint64, dialer, listener *Host, local, remote netip.AddrPort) *connection {
	n := dialer.network
	c := &connection{network: n, alarm: newAlarm(&n.mu)}
	a := &end{connection: c, host: dialer, local: local, remote: remote}
	b := &end{connection: c, host: listener, local: remote, remote: local}
	a.peer, b.peer = b, a
	c.ends = [2]*end{a, b}
	newPipe := func(from, to *end, direction string) *pipe {
		dial := pair{dialer.name, listener.name}
		return &pipe{
			from: from, to: to,
			readRandom:  n.random(dial, index, direction+" read"),
			writeRandom: n.random(dial, index, direction+" write"),
			delayRandom: n.random(dial, index, direction+" delay"),
			cutRandom:   n.random(dial, index, direction+" cut"),
		}
	}
	a.out = newPipe(a, b, "there")
	b.out = newPipe(b, a, "back")
	a.in, b.in = b.out, a.out
	c.limit(n.between(dialer, listener))
	n.connections[c] = struct{}{}
	return c
}

// faults returns what holds on the connection now.
func (c *connection) faults() Faults { return c.network.between(c.ends[0].host, c.ends[1].host) }

func (c *connection) blocked() bool { return c.network.blocked(c.ends[0].host, c.ends[1].host) }

// limit sets the offsets at which the connection is cut, counted from here.
func (c *connection) limit(f Faults) {
	for _, e := range c.ends {
		e.out.cutAt = 0
		if f.CutAfter > 0 {
			e.out.cutAt = e.out.written + f.CutAfter
		}
		if f.CutWithin > 0 {
			at := e.out.written + draw(e.out.cutRandom, f.CutWithin)
			if e.out.cutAt == 0 || at < e.out.cutAt {
				e.out.cutAt = at
			}
		}
	}
}

// settle lets arrive what is due.
func (c *connection) settle() {
	now := time.Now()
	c.ends[0].in.settle(now)
	c.ends[1].in.settle(now)
}

// cut resets both ends.
func (c *connection) cut() {
	c.ends[0].suffer(reset)
	c.ends[1].suffer(reset)
}

// suffer gives an end its fate, of which the worst counts.
func (e *end) suffer(f fate) {
	e.fate = max(e.fate, f)
	e.connection.alarm.cond.Broadcast()
}

// finish sends the end of the stream behind its last byte.
func (e *end) finish() {
	if e.finished {
		return
	}
	e.finished = true
	e.out.post(packet{end: e.out.written, fin: true}, time.Now(), e.connection.faults())
	e.connection.alarm.cond.Broadcast()
}

// shutdown ends both directions.
func (e *end) shutdown() {
	if e.shut {
		return
	}
	e.finish()
	e.shut = true
	e.in.drop()
	e.connection.alarm.cond.Broadcast()
}

// release is shutdown by the owner, who will not call again. It reports whether this was the first.
func (e *end) release() bool {
	if e.released {
		return false
	}
	e.shutdown()
	e.released = true
	if e.peer.released {
		c := e.connection
		c.alarm.stop()
		delete(c.network.connections, c)
	}
	return true
}

// fails reports how an end fails from outside, as far as the news has come through.
func (e *end) fails() fate {
	if e.fate == whole || e.connection.blocked() {
		return whole
	}
	return e.fate
}

// readable returns how many bytes one call may read now: 0 and nil where there is nothing to read yet.
func (e *end) readable() (uint64, error) {
	if e.shut {
		return 0, io.EOF
	}
	if e.host.paused {
		return 0, nil
	}
	if e.fails() == reset {
		return 0, syscall.ECONNRESET
	}
	p := e.in
	p.settle(time.Now())
	if n := p.arrived - p.read; n > 0 {
		return torn(&p.readTear, p.read, n, e.connection.faults().Tear, p.readRandom), nil
	}
	switch {
	case e.fails() == severed && p.read == p.written:
		return 0, syscall.ECONNRESET
	case p.ended:
		return 0, io.EOF
	}
	return 0, nil
}

// writable returns how many bytes one call may write now: 0 and nil where there is no room yet.
func (e *end) writable() (uint64, error) {
	if e.finished || e.shut {
		return 0, syscall.EPIPE
	}
	if e.host.paused {
		return 0, nil
	}
	if e.fails() != whole {
		return 0, syscall.ECONNRESET
	}
	e.in.settle(time.Now())
	if e.peer.shut && e.in.ended {
		return 0, syscall.EPIPE
	}
	f, p := e.connection.faults(), e.out
	room := f.Buffer
	if room == 0 {
		room = defaultBuffer
	}
	if held := uint64(p.queue.size); held < room {
		room -= held
	} else {
		return 0, nil
	}
	room = torn(&p.writeTear, p.written, room, f.Tear, p.writeRandom)
	if p.cutAt > 0 {
		room = min(room, p.cutAt-p.written)
	}
	return e.host.lifeLeft(room), nil
}

// nextNews returns when something arrives for a call that found nothing to do; the zero time where it is not known.
func (e *end) nextNews() time.Time {
	if e.host.paused || e.connection.blocked() || len(e.in.packets) == 0 {
		return time.Time{}
	}
	return e.in.packets[0].due
}

// torn shortens a call that may move n bytes from an offset on. border is where the piece that the offset lies in ends.
func torn(border *uint64, offset, n, tear uint64, r *rand.Rand) uint64 {
	if tear == 0 {
		return n
	}
	if *border <= offset {
		*border = offset + draw(r, tear)
	}
	return min(n, *border-offset)
}

// take reads into a buffer that is no larger than what readable returned.
func (e *end) take(into []byte) {
	p := e.in
	p.queue.get(into)
	p.read += uint64(len(into))
}

// taken ends a call that has taken something: there is room for the sender.
func (e *end) taken() { e.connection.alarm.cond.Broadcast() }

// give writes what is no more than writable returned. The bytes are copied.
func (e *end) give(from []byte) {
	p, c := e.out, e.connection
	if e.peer.shut && !c.blocked() {
		p.read += uint64(len(from)) // nobody will read it; the news is on its way
	} else {
		p.queue.put(from)
	}
	p.written += uint64(len(from))
	c.network.carried += uint64(len(from))
}

// sent ends a call that has given something: it sends the packets, and the deaths that fall due with the last byte.
func (e *end) sent(first uint64) {
	p, c := e.out, e.connection
	f, now := c.faults(), time.Now()
	for at := first; at < p.written; {
		at = min(at+packetBytes, p.written)
		p.post(packet{end: at}, now, f)
	}
	if p.cutAt > 0 && p.written == p.cutAt {
		e.suffer(reset)
		e.peer.suffer(severed)
	}
	e.host.live(p.written - first)
	c.alarm.cond.Broadcast()
}

// post sends a packet: it is settled here when it arrives.
func (p *pipe) post(k packet, now time.Time, f Faults) {
	if f.Latency > 0 || f.Jitter > 0 || f.BytesPerSecond > 0 || f.Loss > 0 {
		k.due = p.arrival(k.end-p.posted, now, f)
	}
	if k.due.Before(p.lastDue) {
		k.due = p.lastDue
	}
	p.posted, p.lastDue = k.end, k.due
	if last := len(p.packets) - 1; last >= 0 && p.packets[last].due.Equal(k.due) {
		p.packets[last] = k
		return
	}
	p.packets = append(p.packets, k)
}

// arrival draws when a packet that is sent now arrives.
func (p *pipe) arrival(bytes uint64, now time.Time, f Faults) time.Time {
	due := now
	if f.BytesPerSecond > 0 {
		if p.lineFree.Before(now) {
			p.lineFree = now
		}
		p.lineFree = p.lineFree.Add(time.Duration(float64(bytes) / float64(f.BytesPerSecond) * float64(time.Second)))
		due = p.lineFree
	}
	due = due.Add(f.Latency)
	if f.Jitter > 0 {
		due = due.Add(time.Duration(p.delayRandom.Int64N(int64(f.Jitter))))
	}
	if f.Loss > 0 && p.delayRandom.Float64() < f.Loss {
		due = due.Add(retransmit)
	}
	return due
}

// settle lets arrive what is due.
func (p *pipe) settle(now time.Time) {
	if len(p.packets) == 0 || p.to.connection.blocked() {
		return
	}
	due := 0
	for due < len(p.packets) && !p.packets[due].due.After(now) {
		p.arrived = max(p.arrived, p.packets[due].end)
		p.ended = p.packets[due].fin
		due++
	}
	if due == len(p.packets) {
		p.packets = p.packets[:0]
	} else {
		p.packets = p.packets[due:]
	}
}

// drop forgets what nobody will read.
func (p *pipe) drop() {
	p.queue = ring{}
	p.read = p.written
}

// ring is a queue of bytes that grows as it is filled.
type ring struct {
	bytes []byte
	start int // index of the first byte
	size  int // bytes held
}

const ringStart = 4 << 10 // an idle connection, or one for small messages, costs no more

func (r *ring) put(from []byte) {
	if need := r.size + len(from); need > len(r.bytes) {
		grown := make([]byte, max(ringStart, 2*len(r.bytes), need))
		size := r.size
		r.get(grown[:size])
		*r = ring{bytes: grown, size: size}
	}
	at := (r.start + r.size) % len(r.bytes)
	n := copy(r.bytes[at:], from)
	copy(r.bytes, from[n:])
	r.size += len(from)
}

func (r *ring) get(into []byte) {
	if len(into) == 0 {
		return
	}
	n := copy(into, r.bytes[r.start:])
	copy(into[n:], r.bytes)
	r.start = (r.start + len(into)) % len(r.bytes)
	r.size -= len(into)
}
