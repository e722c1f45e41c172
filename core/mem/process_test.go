// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// ownerBytes is what an owner shows of its memory.
const ownerBytes = 40 << 20

// pattern is what stands in an owner's memory: no eight bytes of it are like any other.
func pattern(bytes []byte) {
	for i := 0; i < len(bytes); i += 8 {
		binary.LittleEndian.PutUint64(bytes[i:], uint64(i+1)*0x9E3779B97F4A7C15)
	}
}

// playMemory is an owner of private memory that does nothing but live.
func playMemory(orders *bufio.Scanner) {
	memory := must(NewBuffer(ownerBytes))
	pattern(memory.Bytes())
	canary := must(NewCanary())
	value := canary.Value()
	say(uint64(memory.Addr()), uint64(canary.Addr()), hex.EncodeToString(value[:]))
	for orders.Scan() {
		switch orders.Text() {
		case "hide": // the second page can't be read any more
			mustNot(unix.Mprotect(memory.Bytes()[page:2*page], unix.PROT_NONE))
		case "close":
			mustNot(canary.Close())
		case "exec":
			become("idle")
		}
		say("done")
	}
}

// become replaces this program by itself with another part to play.
func become(part string) {
	mustNot(os.Setenv(partVariable, part))
	mustNot(syscall.Exec("/proc/self/exe", os.Args, os.Environ()))
}

// playReader probes the processes that it is told of.
func playReader(orders *bufio.Scanner) {
	say("ready")
	for orders.Scan() {
		words := strings.Fields(orders.Text())
		p := &Process{Pid: must(strconv.Atoi(words[0])), CanaryAddr: uintptr(must(strconv.ParseUint(words[1], 10, 64)))}
		copy(p.Canary[:], must(hex.DecodeString(words[2])))
		var errno unix.Errno
		switch err := p.Probe(); {
		case err == nil:
			say("read")
		case errors.As(err, &errno):
			say(unix.ErrnoName(errno))
		default:
			say(err)
		}
	}
}

// owner starts an owner and returns where its memory is, and how to reach it.
func owner(t testing.TB, configure ...func(*exec.Cmd)) (*peer, uintptr, *Process) {
	t.Helper()
	o := start(t, "memory", configure...)
	words := o.hear()
	process := &Process{Pid: o.pid(), CanaryAddr: uintptr(o.number(words[1]))}
	canary, err := hex.DecodeString(words[2])
	require.NoError(t, err)
	copy(process.Canary[:], canary)
	return o, uintptr(o.number(words[0])), process
}

// reachable skips the test where another process of ours can't be read, which containers and hardened systems may say.
func reachable(t testing.TB, p *Process) {
	t.Helper()
	if err := p.Probe(); errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		t.Skipf("not allowed here: %v", err)
	} else {
		require.NoError(t, err)
	}
}

func TestAnotherProcessIsReadByteForByte(t *testing.T) {
	leaves(t)
	_, at, process := owner(t)
	reachable(t, process)
	want := make([]byte, ownerBytes)
	pattern(want)
	dst, err := NewBuffer(ownerBytes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, dst.Free()) })

	t.Run("one move of 40 MiB", func(t *testing.T) {
		moves := []Move{{dst.Addr(), at, ownerBytes}}
		require.NoError(t, process.Copy(moves, 0, ownerBytes))
		require.True(t, bytes.Equal(want, dst.Bytes()))
		clear(dst.Bytes())
		require.NoError(t, process.Copy(moves, 3<<20+1, 17<<20))
		require.True(t, bytes.Equal(want[3<<20+1:20<<20+1], dst.Bytes()[3<<20+1:20<<20+1]))
		require.Zero(t, bytes.Count(dst.Bytes()[:3<<20+1], []byte{0})-(3<<20+1), "nothing before the part")
		require.Zero(t, bytes.Count(dst.Bytes()[20<<20+1:], []byte{0})-(20<<20-1), "nothing after it")
	})
	for _, count := range []int{1, 1022, 1023, 1024, 2046, 2047, 5791, 20000} {
		t.Run(fmt.Sprintf("%d small moves", count), func(t *testing.T) {
			clear(dst.Bytes())
			moves, expected := scattered(count, at, dst.Addr(), want)
			total := uint64(len(expected))
			require.NoError(t, process.Copy(moves, 0, total))
			require.True(t, bytes.Equal(expected, dst.Bytes()[:total]))
			// The same in parts, several at once.
			clear(dst.Bytes())
			var all sync.WaitGroup
			for part := range uint64(4) {
				from, to := total*part/4, total*(part+1)/4
				all.Go(func() { require.NoError(t, process.Copy(moves, from, to-from)) })
			}
			all.Wait()
			require.True(t, bytes.Equal(expected, dst.Bytes()[:total]))
		})
	}
	require.NoError(t, process.Copy(nil, 0, 0))
	require.NoError(t, process.Copy([]Move{{1, 1, 8}}, 3, 0), "no bytes touch nothing")
	require.ErrorContains(t, process.Copy([]Move{{dst.Addr(), at, 8}}, 0, 9), "ends 1 bytes early")
}

// scattered is a list of moves of up to 5,000 bytes (some of none) from anywhere in an owner's memory, and what they bring.
func scattered(count int, src, dst uintptr, memory []byte) (moves []Move, want []byte) {
	random := rand.New(rand.NewPCG(uint64(count), 2))
	for i := range count {
		n := random.IntN(5000)
		if i%100 == 99 {
			n = 0
		}
		n = min(n, ownerBytes-len(want))
		from := random.IntN(ownerBytes - n)
		moves = append(moves, Move{Dst: dst + uintptr(len(want)), Src: src + uintptr(from), Bytes: uint64(n)})
		want = append(want, memory[from:from+n]...)
	}
	return moves, want
}

func TestReadingAnotherProcessAllocatesNothing(t *testing.T) {
	_, at, process := owner(t)
	reachable(t, process)
	dst := pages(t, 16)
	var moves []Move
	for i := range uintptr(2000) {
		moves = append(moves, Move{dst.Addr() + i*16, at + i*64, 16})
	}
	require.Zero(t, testing.AllocsPerRun(100, func() { _ = process.Copy(moves, 0, 32000) }))
	require.Zero(t, testing.AllocsPerRun(100, func() { _ = process.Probe() }))
}

func TestAnotherCanaryIsAnotherProcess(t *testing.T) {
	_, at, process := owner(t)
	reachable(t, process)
	dst := pages(t, 1)
	for bit := range 128 {
		wrong := *process
		wrong.Canary[bit/8] ^= 1 << (bit % 8)
		require.ErrorIs(t, wrong.Probe(), ErrOtherProcess)
		require.ErrorIs(t, wrong.Copy([]Move{{dst.Addr(), at, 8}}, 0, 8), ErrOtherProcess)
	}
	require.NoError(t, process.Probe())
}

func TestWhatEndsAProcessEndsReadingIt(t *testing.T) {
	cases := []struct {
		name string
		end  func(o *peer)
		want error
	}{
		{"exec", func(o *peer) { o.tell("exec"); require.Equal(o.t, []string{"idle"}, o.hear()) }, ErrOtherProcess},
		{"closed canary", func(o *peer) { o.tell("close"); o.hear() }, ErrOtherProcess},
		{"SIGKILL", func(o *peer) { o.end(unix.SIGKILL) }, unix.ESRCH},
		{"not waited for", func(o *peer) {
			require.NoError(o.t, unix.Kill(o.pid(), unix.SIGKILL))
			require.NoError(o.t, unix.Waitid(unix.P_PID, o.pid(), nil, unix.WEXITED|unix.WNOWAIT, nil))
		}, unix.ESRCH},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			leaves(t)
			o, at, process := owner(t)
			reachable(t, process)
			dst := pages(t, 1)
			moves := []Move{{dst.Addr(), at, page}}
			require.NoError(t, process.Copy(moves, 0, page))
			c.end(o)
			err := process.Copy(moves, 0, page)
			require.ErrorIs(t, err, c.want)
			require.NotErrorIs(t, err, unix.EFAULT, "that is what memory gone from a live process is")
			require.ErrorContains(t, err, fmt.Sprintf("read %d bytes at %#x of process %d: ", page, at, o.pid()))
			require.ErrorIs(t, process.Probe(), c.want)
		})
	}
}

func TestAStoppedProcessCanBeRead(t *testing.T) {
	o, at, process := owner(t)
	reachable(t, process)
	o.stop()
	dst := pages(t, 1)
	require.NoError(t, process.Copy([]Move{{dst.Addr(), at, page}}, 0, page))
}

func TestFaultsOfEitherEndAreToldApart(t *testing.T) {
	o, at, process := owner(t)
	reachable(t, process)
	o.tell("hide")
	o.hear()
	good, holed := pages(t, 4), pages(t, 3)
	hole(t, holed, 1)
	second := at + uintptr(page)
	local := holed.Addr() + uintptr(page)
	cases := []struct {
		name  string
		moves []Move
		done  uint64 // what is copied before
		what  string
	}{
		{"source", []Move{{good.Addr(), second, 8}}, 0, fmt.Sprintf("read 8 bytes at %#x of process %d: the source", second, o.pid())},
		{"source behind others", []Move{{good.Addr(), at, 8}, {good.Addr() + 8, at + 8, 8}, {good.Addr() + 16, second + 5, 3}}, 16,
			fmt.Sprintf("read 3 bytes at %#x of process %d: the source", second+5, o.pid())},
		{"source in the middle", []Move{{good.Addr(), at, 3 * page}}, page,
			fmt.Sprintf("read %d bytes at %#x of process %d: the source", 2*page, second, o.pid())},
		{"source 1", []Move{{good.Addr(), 1, 8}}, 0, "at 0x1 of"},
		{"source at the end of the address space", []Move{{good.Addr(), 1<<64 - 4, 8}}, 0, "the source is not readable"},
		{"destination", []Move{{local, at, 8}}, 0, fmt.Sprintf("the destination here, at %#x, is not writable", local)},
		{"destination in the middle", []Move{{good.Addr(), at, 8}, {local - 8, at, 16}}, 16, fmt.Sprintf("the destination here, at %#x", local)},
		{"destination 1", []Move{{1, at, 8}}, 0, "the destination here, at 0x1"},
		{"destination of the kernel", []Move{{1<<63 + 4096, at, 8}}, 0, "the destination here"},
	}
	want := make([]byte, page)
	pattern(want)
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			clear(good.Bytes())
			var total uint64
			for _, m := range c.moves {
				total += m.Bytes
			}
			err := process.Copy(c.moves, 0, total)
			require.ErrorIs(t, err, unix.EFAULT)
			require.NotErrorIs(t, err, ErrOtherProcess)
			require.ErrorContains(t, err, c.what)
			if c.moves[0].Dst == good.Addr() {
				n := min(c.done, c.moves[0].Bytes)
				require.Equal(t, want[:n], good.Bytes()[:n], "moves before the fault are done")
			}
			require.NoError(t, process.Probe())
		})
	}
}

// As users beside root, which may read everything.
func TestAnotherUsersProcessIsRefused(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be two users")
	}
	leaves(t)
	as := func(id uint32) func(*exec.Cmd) {
		return func(c *exec.Cmd) {
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: id, Gid: id}}
		}
	}
	o, _, process := owner(t, as(54321))
	order := fmt.Sprintf("%d %d %x", process.Pid, process.CanaryAddr, process.Canary)
	other := start(t, "reader", as(54322))
	other.hear()
	other.tell(order)
	require.Equal(t, []string{"EPERM"}, other.hear())
	if scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && strings.TrimSpace(string(scope)) != "0" {
		return
	}
	same := start(t, "reader", as(54321))
	same.hear()
	same.tell(order)
	require.Equal(t, []string{"read"}, same.hear())
	o.end(unix.SIGKILL)
	same.tell(order)
	require.Equal(t, []string{"ESRCH"}, same.hear())
}
