// SPDX-License-Identifier: Apache-2.0

package fabric

import (
	"fmt"
	"syscall"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// stream is an end as a data connection.
type stream struct {
	end *end
}

var _ transport.Conn = (*stream)(nil)

const maxWait = transport.MaxWaitMillis * time.Millisecond

// Receive is described at [transport.Conn]. After Shutdown it returns io.EOF at once.
func (s *stream) Receive(spans []mem.Span) (int, error) { return s.receive(spans, maxWait) }

// TryReceive is described at [transport.Conn].
func (s *stream) TryReceive(spans []mem.Span) (int, error) { return s.receive(spans, 0) }

// Send is described at [transport.Conn]: the bytes are out of the caller's memory when it returns. After Shutdown, and once the end of
// the peer has arrived here, it returns EPIPE.
func (s *stream) Send(spans []mem.Span) (int, error) { return s.send(spans, maxWait) }

// TrySend is described at [transport.Conn].
func (s *stream) TrySend(spans []mem.Span) (int, error) { return s.send(spans, 0) }

// Park is described at [transport.Conn].
func (s *stream) Park() {
	e := s.end
	e.connection.network.mu.Lock()
	defer e.connection.network.mu.Unlock()
	for {
		if n, err := e.readable(); n > 0 || err != nil {
			return
		}
		e.connection.alarm.wait(e.nextNews())
	}
}

// Shutdown is described at [transport.Conn]. The peer reads what was sent before, then io.EOF.
func (s *stream) Shutdown() {
	s.end.connection.network.mu.Lock()
	defer s.end.connection.network.mu.Unlock()
	s.end.shutdown()
}

// Close is described at [transport.Conn]. A second Close does nothing.
func (s *stream) Close() error {
	s.end.connection.network.mu.Lock()
	defer s.end.connection.network.mu.Unlock()
	s.end.release()
	return nil
}

// Path is "ip:port -> ip:port, fabric".
func (s *stream) Path() string {
	return fmt.Sprintf("%s -> %s, %s", s.end.local, s.end.remote, networkName)
}

func (s *stream) receive(spans []mem.Span, wait time.Duration) (int, error) {
	e := s.end
	return s.transfer(spans, wait, e.readable, func(spans []mem.Span, most uint64) int {
		defer e.taken()
		return each(spans, most, e.take)
	})
}

func (s *stream) send(spans []mem.Span, wait time.Duration) (int, error) {
	e := s.end
	return s.transfer(spans, wait, e.writable, func(spans []mem.Span, most uint64) int {
		defer e.sent(e.out.written)
		return each(spans, most, e.give)
	})
}

// transfer waits until ready allows some bytes, at most for wait, and moves no more than these. As in the system, memory is looked
// at only then: what is ready or has ended comes before EFAULT.
func (s *stream) transfer(
	spans []mem.Span, wait time.Duration, ready func() (uint64, error), move func([]mem.Span, uint64) int,
) (int, error) {
	spans, fault := s.accessible(spans)
	nothing := bytes(spans) == 0
	if nothing && !fault {
		return 0, nil
	}
	e := s.end
	e.connection.network.mu.Lock()
	defer e.connection.network.mu.Unlock()
	var until time.Time
	if wait > 0 {
		until = time.Now().Add(wait)
	}
	for {
		most, err := ready()
		switch {
		case err != nil:
			return 0, err
		case most > 0 && nothing:
			return 0, syscall.EFAULT
		case most > 0:
			return move(spans, most), nil
		case !time.Now().Before(until):
			return 0, nil
		}
		e.connection.alarm.wait(earliest(until, e.nextNews()))
	}
}

// accessible returns the spans before the first one that the host's hook faults, and whether there is one.
func (s *stream) accessible(spans []mem.Span) ([]mem.Span, bool) {
	network := s.end.connection.network
	network.mu.Lock()
	hook := s.end.host.fault
	network.mu.Unlock()
	for i, span := range spans {
		if faulted(hook, span.Addr, span.Bytes) {
			return spans[:i], true
		}
	}
	return spans, false
}

// each hands the memory of spans, in order and up to a number of bytes, to move.
func each(spans []mem.Span, most uint64, move func([]byte)) int {
	moved := uint64(0)
	for _, span := range spans {
		if n := min(span.Bytes, most-moved); n > 0 {
			move(mem.View(span.Addr, n))
			moved += n
		}
	}
	return int(moved)
}

func bytes(spans []mem.Span) uint64 {
	sum := uint64(0)
	for _, span := range spans {
		sum += span.Bytes
	}
	return sum
}
