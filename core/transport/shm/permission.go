// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// permission is what the Yama security module knows of a process: one other process may read its memory. All engines of the process have it
// together, and all their links.
type permission struct {
	asks  func() bool         // reading takes a permission here
	grant func(pid int) error // in place of the one that had it; 0: nobody

	mu    sync.Mutex // guards what follows
	pid   int        // of the process that has it; 0: none
	links int        // with that process
}

// ours is the permission of this process.
var ours = permission{asks: yamaAsks, grant: func(pid int) error { return unix.Prctl(unix.PR_SET_PTRACER, uintptr(pid), 0, 0, 0) }}

// permit lets the process pid read our private memory, for the life of a link with it. The first peer has the permission until its last
// link ends, and others do without. What it returns ends that, once.
func (p *permission) permit(pid int) (forbid func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if pid == 0 || pid == os.Getpid() || !p.has(pid) { // a process may always read its own memory
		return func() {}
	}
	p.links++
	return sync.OnceFunc(p.leave)
}

// has says whether pid has the permission, and gives it to it where nobody has it. Called with mu held.
func (p *permission) has(pid int) bool {
	if p.pid == 0 && p.asks() && p.grant(pid) == nil {
		p.pid = pid
	}
	return p.pid == pid
}

func (p *permission) leave() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.links--; p.links == 0 {
		p.pid = 0
		_ = p.grant(0) // the process is gone, or has no link any more
	}
}

// yamaScope is where the kernel says that reading a process of the same uid takes a permission of that process ("1"; absent without the
// Yama security module).
const yamaScope = "/proc/sys/kernel/yama/ptrace_scope"

func yamaAsks() bool {
	text, err := os.ReadFile(yamaScope)
	return err == nil && strings.TrimSpace(string(text)) == "1"
}
