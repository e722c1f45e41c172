// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"fmt"
	"os"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// refusal makes a system call fail with errno, where it is meant: with its argument of that index having that value.
type refusal struct {
	call            uint32
	argument, value uint32
	errno           unix.Errno
}

// refuse has the kernel refuse calls of this process from now on, as an older one or a sandbox would.
func refuse(refusals ...refusal) error {
	const number, arguments = 0, 16 // offsets in struct seccomp_data
	var code []unix.SockFilter
	for _, r := range refusals {
		code = append(code,
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: r.call, Jf: 3},
			unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arguments + 8*r.argument},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: r.value, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(r.errno)})
	}
	code = append(code, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return fmt.Errorf("seccomp: %w", errno)
	}
	return nil
}

// playOld tells what comes of everything on a system that has none of it.
func playOld(*bufio.Scanner) {
	pool := must(Host().Reserve(page)).(*HostMemory)
	View(pool.Addr(), 1)[0] = 1
	early := must(NewPages("llm_datadist test", page))
	if err := refuse(
		refusal{unix.SYS_FCNTL, 1, unix.F_ADD_SEALS, unix.EINVAL},
		refusal{unix.SYS_MADVISE, 2, unix.MADV_POPULATE_READ, unix.EINVAL},
		refusal{unix.SYS_SET_ROBUST_LIST, 1, 24, unix.ENOSYS},
		refusal{unix.SYS_PROCESS_VM_READV, 5, 0, unix.ENOSYS},
	); err != nil {
		say("skip:", err)
		return
	}
	say("refused")
	_, err := NewPages("llm_datadist test", page)
	say("pages:", err)
	say("vow:", Vow(early.Addr()), early.Words()[VowWord/8].Load(), vows.keeper == nil)
	for strings.Contains(stacks(), "(*keeper)") {
		runtime.Gosched() // it was waited for, but for its last instructions
	}
	canary := must(NewCanary())
	say("probe:", (&Process{Pid: os.Getpid(), CanaryAddr: canary.Addr(), Canary: canary.Value()}).Probe())
	say("populate:", must(MapShared(pool.FD(), page, PoolSeals)).Populate(0, page))
	say("descriptors:", len(listed(&descriptors)))
}

func TestASystemThatLacksItSaysSo(t *testing.T) {
	leaves(t)
	p := start(t, "old")
	if first := p.hear(); first[0] == "skip:" {
		t.Skip(first)
	}
	for _, want := range [][]string{
		{"pages:", "LLM_FEATURE_NOT_ENABLED", "stage check", "seal shared pages", "invalid argument", "Linux 5.1"},
		{"vow:", "LLM_FEATURE_NOT_ENABLED", "set_robust_list: function not implemented", " 0 true"},
		{"probe:", "read 16 bytes at", "function not implemented"},
		{"populate: <nil>"},
		{"descriptors: 3"},
	} {
		said := strings.Join(p.hear(), " ")
		for _, part := range want {
			require.Contains(t, said, part)
		}
	}
}
