// SPDX-License-Identifier: Apache-2.0

package tcp

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
)

// poller waits for all parked connections of the process. It lives as long as there are connections.
// It is not Go's own network poller: that one is told of every packet of an active connection too. But that one waits for it, as for any
// file, since a goroutine that waits in a system call of its own has Go's monitor wake every 20 us for a while (see mem.Stint).
type poller struct {
	file    *os.File // an epoll
	epoll   int      // its descriptor
	stopped chan struct{}
	users   int // guarded by shared.mu

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
	p := &poller{epoll: epoll, stopped: make(chan struct{}), parked: map[int]chan struct{}{}}
	err = unix.SetNonblock(epoll, true) // Go waits for a file only where reading it never blocks
	p.file = os.NewFile(uintptr(epoll), "epoll")
	raw, connErr := p.file.SyscallConn()
	if err := errors.Join(err, connErr, p.file.SetReadDeadline(time.Time{}), mem.Track(epoll)); err != nil { // no deadline: Go can't wait
		p.close()
		return nil, err
	}
	go p.run(raw)
	return p, nil
}

func (p *poller) close() {
	mem.Untrack(p.epoll)
	_ = p.file.Close()
}

// release gives up one use; the last one stops the poller and waits for it.
func (p *poller) release() {
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if p.users--; p.users > 0 {
		return
	}
	shared.poller = nil
	p.close()
	<-p.stopped
}

// run ends when the file is closed. Nothing is parked any more then.
func (p *poller) run(raw syscall.RawConn) {
	defer close(p.stopped)
	events := make([]unix.EpollEvent, 64)
	_ = raw.Read(func(fd uintptr) (done bool) {
		for { // until there is no more: Go is told of what is new alone
			n, err := unix.EpollWait(int(fd), events, 0)
			switch {
			case err == unix.EINTR:
				continue
			case n <= 0:
				return false
			}
			for _, e := range events[:n] {
				p.rouse(int(e.Fd))
			}
		}
	})
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
