// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"sync"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
)

// poller waits for all parked connections of the process with one thread. It lives as long as there are connections.
// It is not Go's own network poller: that one is told of every packet of an active connection too.
type poller struct {
	epoll, wakeup int
	stopped       chan struct{}
	users         int // guarded by shared.mu

	mu     sync.Mutex // guards parked
	parked map[int]chan struct{}
}

var shared struct {
	mu     sync.Mutex // guards poller and its users
	poller *poller
}

// sharedPoller returns the process's poller, started on first use. The caller releases it.
func sharedPoller() (*poller, error) {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if shared.poller == nil {
		p, err := newPoller()
		if err != nil {
			return nil, err
		}
		shared.poller = p
	}
	shared.poller.users++
	return shared.poller, nil
}

func newPoller() (*poller, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	wakeup, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		_ = unix.Close(epoll)
		return nil, err
	}
	p := &poller{epoll: epoll, wakeup: wakeup, stopped: make(chan struct{}), parked: map[int]chan struct{}{}}
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(wakeup)}
	if err := unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, wakeup, &event); err != nil {
		p.closeDescriptors()
		return nil, err
	}
	for _, fd := range []int{epoll, wakeup} {
		if err := mem.Track(fd); err != nil {
			p.closeDescriptors()
			return nil, err
		}
	}
	go p.run()
	return p, nil
}

func (p *poller) closeDescriptors() {
	for _, fd := range []int{p.epoll, p.wakeup} {
		mem.Untrack(fd)
		_ = unix.Close(fd)
	}
}

// release gives up one use; the last one stops the poller and waits for it.
func (p *poller) release() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if p.users--; p.users > 0 {
		return
	}
	shared.poller = nil
	one := [8]byte{1}
	_, _ = unix.Write(p.wakeup, one[:]) // an eventfd takes 8 bytes unless its counter is full, which wakes as well
	<-p.stopped
	p.closeDescriptors()
}

func (p *poller) run() {
	defer close(p.stopped)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(p.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return // a closed epoll: nothing is parked any more
		}
		for _, e := range events[:max(n, 0)] {
			if int(e.Fd) == p.wakeup {
				return
			}
			p.rouse(int(e.Fd))
		}
	}
}

// list returns a channel that is closed when fd is roused and, where it is watched, when it is readable or closed by its peer.
func (p *poller) list(fd int, watched bool) <-chan struct{} {
	roused := make(chan struct{})
	p.mu.Lock()
	p.parked[fd] = roused
	p.mu.Unlock()
	event := eventOf(fd, watched)
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_ADD, fd, &event); err != nil {
		p.rouse(fd)
	}
	return roused
}

// arm changes whether a listed fd is watched.
func (p *poller) arm(fd int, watched bool) {
	event := eventOf(fd, watched)
	if err := unix.EpollCtl(p.epoll, unix.EPOLL_CTL_MOD, fd, &event); err != nil {
		p.rouse(fd)
	}
}

// unlist undoes list.
func (p *poller) unlist(fd int) {
	p.rouse(fd)
	_ = unix.EpollCtl(p.epoll, unix.EPOLL_CTL_DEL, fd, nil) // ENOENT where adding had failed
}

func eventOf(fd int, watched bool) unix.EpollEvent {
	event := unix.EpollEvent{Events: unix.EPOLLONESHOT, Fd: int32(fd)} // errors are told of in any case
	if watched {
		event.Events |= unix.EPOLLIN | unix.EPOLLRDHUP
	}
	return event
}

// rouse wakes who is parked on fd, if anybody.
func (p *poller) rouse(fd int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if roused, ok := p.parked[fd]; ok {
		delete(p.parked, fd)
		close(roused)
	}
}
