// SPDX-License-Identifier: Apache-2.0

package link

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// pings are the signs of life of a link across hosts. On one host there are none: a peer there is dead when its sockets close or its
// process is gone, never because it is slow or stopped.
type pings struct {
	every time.Duration // time between two of ours; 0: none
	limit time.Duration // silence that we take for death; 0: none
	heard atomic.Bool   // since the last tick
}

const (
	pingsPerSilence = 4
	// A peer must not make us spin by asking for pings without end.
	minPingEvery = 10 * time.Millisecond
)

// pace returns the time between pings that satisfies both ends, each of which lets the other be silent for so long (0: for ever).
func pace(ours, theirs time.Duration) time.Duration {
	strict := ours
	if strict == 0 || (theirs > 0 && theirs < strict) {
		strict = theirs
	}
	if strict == 0 {
		return 0
	}
	return max(strict/pingsPerSilence, minPingEvery)
}

// start gives the link its goroutines. m.tasks has been counted up by one already.
func (l *Link) start() {
	l.manager.eventOf(Info, l.peer.ClusterID, "linked, "+l.peer.Address, nil)
	reader := make(chan struct{})
	if l.control == nil {
		close(reader)
	} else {
		go func() {
			defer close(reader)
			l.Fail(l.listen())
		}()
	}
	go func() {
		defer l.manager.tasks.Done()
		l.watch()
		l.bury(reader)
	}()
}

// listen reads the control connection until it breaks.
func (l *Link) listen() error {
	for {
		_, size, err := readFrameHeader(l.control, maxFrameBytes)
		if err == nil {
			l.pings.heard.Store(true)
			err = skip(l.control, size)
		}
		if errors.Is(err, io.EOF) {
			return errors.New("it closed its connections, or its process ended")
		}
		if err != nil {
			return fmt.Errorf("control connection: %w", err)
		}
	}
}

// watch returns when the link is dead.
func (l *Link) watch() {
	if witness := l.peer.Witness; witness != nil {
		select {
		case <-l.dead:
		case <-witness.Dead():
			l.Fail(errors.New("its process is gone"))
		}
		return
	}
	if l.pings.every == 0 {
		<-l.dead
		return
	}
	l.keepAlive()
}

// keepAlive pings the peer and listens for its pings.
func (l *Link) keepAlive() {
	ticker := time.NewTicker(l.pings.every)
	defer ticker.Stop()
	var silent time.Duration
	last := time.Now()
	for {
		select {
		case <-l.dead:
			return
		case <-ticker.C:
		}
		now := time.Now()
		silent = l.pings.judge(silent, now.Sub(last))
		last = now
		if l.pings.limit > 0 && silent >= l.pings.limit {
			l.Fail(fmt.Errorf("silent for %v", l.pings.limit))
			return
		}
		if err := l.ping(); err != nil {
			l.Fail(fmt.Errorf("control connection: %w", err))
			return
		}
	}
}

// judge returns how long the peer has been silent, at a tick that came elapsed after the one before. A tick that is late says that
// this process was stalled itself: the time that it lost is not held against the peer.
func (p *pings) judge(silent, elapsed time.Duration) time.Duration {
	switch {
	case p.heard.Swap(false):
		return 0
	case elapsed >= 2*p.every:
		return silent
	default:
		return silent + p.every
	}
}

// ping doesn't wait for long: when its few bytes find no room, the peer has not read for thousands of them.
func (l *Link) ping() error {
	_ = l.control.SetWriteDeadline(time.Now().Add(l.pings.every))
	_, err := l.control.Write(appendFrame(nil, framePing, nil))
	return err
}

// bury ends what belongs to a dead link. The control connection closes first, so that the peer knows at once.
func (l *Link) bury(reader <-chan struct{}) {
	if l.control != nil {
		_ = l.control.Close()
		<-reader
	}
	l.session.Close(l.cause)
	if l.peer.Witness != nil {
		l.peer.Witness.Close()
	}
	close(l.gone)
	level := Warning
	if l.farewell != "" {
		level = Info
	}
	l.manager.eventOf(level, l.peer.ClusterID, "link ended", l.cause)
}

// kill marks l dead because of cause; its goroutine does the rest. Only the first cause counts, and one that is a farewell in
// progress counts before all others.
func (m *Manager) kill(l *Link, cause *status.Error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !l.lives() {
		return
	}
	if l.farewell != "" {
		cause = goodbye(l.peer, l.farewell)
	}
	l.cause = cause
	if p := m.pairs[l.peer.Incarnation]; p != nil && p.link == l {
		p.link = nil
		p.retired = max(p.retired, l.number)
	}
	close(l.dead)
	if l.alone {
		close(l.gone) // a link to oneself has nothing to bury
	}
}

// retire kills l and waits until nothing of it is left.
func (m *Manager) retire(l *Link, text string) {
	m.mu.Lock()
	if l.lives() && l.farewell == "" {
		l.farewell = text
	}
	m.mu.Unlock()
	m.kill(l, goodbye(l.peer, text))
	<-l.gone
}

// lives says whether l is alive.
func (l *Link) lives() bool {
	select {
	case <-l.dead:
		return false
	default:
		return true
	}
}

func (l *Link) isGone() bool {
	select {
	case <-l.gone:
		return true
	default:
		return false
	}
}

// ending says why l doesn't serve. The caller holds manager.mu.
func (l *Link) ending() string {
	if l.cause != nil {
		return status.From(l.cause, status.StageTransfer).Cause
	}
	return l.farewell
}

// peerDied is what calls in flight get when the link dies under them.
func peerDied(p Peer, why error) *status.Error {
	cause := "peer died"
	if e := status.From(why, status.StageTransfer); e != nil && !strings.HasPrefix(e.Cause, cause) {
		cause += ": " + e.Cause
	} else if e != nil {
		cause = e.Cause
	}
	failure := status.New(status.Failed, status.StageTransfer, cause).At(p.ClusterID, p.Address)
	failure.Err = why
	return failure
}

// goodbye is what they get when the link is retired in good order.
func goodbye(p Peer, text string) *status.Error {
	return status.New(status.Failed, status.StageTransfer, text).At(p.ClusterID, p.Address)
}
