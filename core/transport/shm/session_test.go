// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"reflect"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// check fails the test when descriptors or mappings are left at its end.
func check(t *testing.T) {
	t.Helper()
	mem.Calibrate() // once in a process; it keeps nothing, but measures for a while
	files, maps := testkit.Descriptors(t), testkit.Mappings(t, "/memfd:")
	t.Cleanup(func() {
		if !t.Failed() {
			require.Equal(t, files, testkit.Descriptors(t), "descriptors")
			require.Equal(t, maps, testkit.Mappings(t, "/memfd:"), "mappings of memfds")
		}
	})
}

// control is a session over data connections, made up: it resolves what it was told, and counts what it is asked to stream.
type control struct {
	resolved transport.Resolved
	streamed int
	closed   int
}

func (c *control) Resolve(context.Context, *transport.Request) (transport.Resolved, error) {
	return c.resolved, nil
}

func (c *control) Pull(context.Context, *transport.Request, transport.Local) error {
	c.streamed++
	return nil
}

func (c *control) Push(context.Context, *transport.Push) error { return nil }

func (c *control) Unconfirmed() <-chan struct{} { return nil }

func (c *control) Close(error) { c.closed++ }

func (c *control) Idle() <-chan struct{} {
	idle := make(chan struct{})
	close(idle)
	return idle
}

var incarnation = [16]byte{1, 2, 3}

const (
	poolBytes = 1 << 20
	pageBytes = 4096
)

var shape = plan.Shape{Kind: plan.Blocks, Tensors: 2, TensorBytes: 4 * pageBytes, Stride: pageBytes, Count: 4}

// ends are an owner's share and a puller's, in one process, and the puller's memory.
type ends struct {
	t           *testing.T
	pool        *mem.HostMemory
	theirs, our *Share
	control     *control
	own         *mem.Buffer // the puller's cache
	generation  uint64
}

func newEnds(t *testing.T) *ends {
	reserved, err := mem.Host().Reserve(poolBytes)
	require.NoError(t, err)
	e := &ends{t: t, pool: reserved.(*mem.HostMemory), control: &control{}}
	e.theirs, err = NewShare(incarnation, []*mem.HostMemory{e.pool}, 1)
	require.NoError(t, err)
	e.our, err = NewShare([16]byte{9}, nil, 2)
	require.NoError(t, err)
	e.own, err = mem.NewBuffer(int(shape.TensorBytes) * int(shape.Tensors))
	require.NoError(t, err)
	return e
}

func (e *ends) close() {
	require.NoError(e.t, errors.Join(e.theirs.Close(), e.our.Close(), e.pool.Close(), e.own.Free()))
}

// config is what the puller's session is made from: the owner's gift.
func (e *ends) config() Config {
	text, fds, err := e.theirs.Gift()
	require.NoError(e.t, err)
	return Config{Share: e.our, Control: e.control, Incarnation: incarnation, Pid: os.Getpid(), Text: text, FDs: fds}
}

func (e *ends) session(cfg Config) *Session {
	s, err := NewSession(cfg)
	require.NoError(e.t, err)
	return s
}

// publish enters a cache of the owner's and has the owner resolve every key to it.
func (e *ends) publish(pool uint32, addrs ...uintptr) (slot int32) {
	e.generation++
	e.control.resolved = transport.Resolved{Generation: e.generation, Shape: shape}
	return e.theirs.Publisher().Publish(directory.Record{ID: 1, Generation: e.generation, Shape: shape, Pool: pool, HasKey: true, Addrs: addrs})
}

func (e *ends) pull(s *Session) error {
	req := &transport.Request{
		Key: transport.Key{Kind: transport.KeyNormal, ID: 5},
		Plan: plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1,
			SrcBlocks: []uint64{3, 1}, DstBlocks: []uint64{0, 2}},
		Local: shape,
	}
	local := transport.Local{Addrs: []uintptr{e.own.Addr(), e.own.Addr() + uintptr(shape.TensorBytes)}, Backing: mem.BackingAnonymous}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return s.Pull(ctx, req, local)
}

// fill gives each block of the memory at addr a byte of its own.
func fill(addr uintptr, first byte) {
	for block := range 4 {
		view := mem.View(addr+uintptr(block*pageBytes), pageBytes)
		copy(view, bytes.Repeat([]byte{first + byte(block)}, pageBytes))
	}
}

func (e *ends) requirePulled(first ...byte) {
	for tensor := range shape.Tensors {
		for block, want := range map[int]byte{0: first[tensor] + 3, 2: first[tensor] + 1, 1: 0, 3: 0} {
			view := mem.View(e.own.Addr()+uintptr(int(tensor)*int(shape.TensorBytes)+block*pageBytes), pageBytes)
			require.Equal(e.t, bytes.Repeat([]byte{want}, pageBytes), view, "tensor %d, block %d", tensor, block)
		}
	}
}

func TestPoolAndPrivateMemoryAreRead(t *testing.T) {
	check(t)
	e := newEnds(t)
	s := e.session(e.config())
	require.Equal(t, []string{"memory of pools: mapped, 1 of them", "private memory: read with process_vm_readv"}, s.Explain())
	fill(e.pool.Addr()+8*pageBytes, 10)
	fill(e.pool.Addr()+16*pageBytes, 20)
	e.publish(1, 8*pageBytes, 16*pageBytes)
	require.NoError(t, e.pull(s))
	e.requirePulled(10, 20)

	private, err := mem.NewBuffer(8 * pageBytes)
	require.NoError(t, err)
	fill(private.Addr(), 30)
	fill(private.Addr()+4*pageBytes, 40)
	slot := e.publish(0, private.Addr(), private.Addr()+4*pageBytes)
	require.NoError(t, e.pull(s))
	e.requirePulled(30, 40)
	require.Zero(t, e.control.streamed)

	e.theirs.Publisher().Withdraw(slot)
	require.NoError(t, e.pull(s), "the owner streams what is not in the directory, or says that it is gone")
	require.Equal(t, 1, e.control.streamed)
	require.NoError(t, private.Free())
	s.Close(errors.New("unlinked"))
	require.Equal(t, 1, e.control.closed)
	e.close()
}

func TestAddressesThatThePeerHasNotAreNotRead(t *testing.T) {
	check(t)
	e := newEnds(t)
	s := e.session(e.config())
	for _, c := range []struct {
		name  string
		pool  uint32
		addrs []uintptr
	}{
		{"no such pool", 2, []uintptr{0, 0}},
		{"a pool far beyond", 1 << 31, []uintptr{0, 0}},
		{"beyond the pool", 1, []uintptr{0, poolBytes}},
		{"beyond the pool with its last byte", 1, []uintptr{0, poolBytes - 4*pageBytes + 1}},
		{"an offset that would wrap", 1, []uintptr{0, ^uintptr(0) - 8*pageBytes}},
	} {
		e.control.streamed = 0
		slot := e.publish(c.pool, c.addrs...)
		require.NoError(t, e.pull(s), c.name)
		require.Equal(t, 1, e.control.streamed, c.name)
		e.theirs.Publisher().Withdraw(slot)
	}
	e.publish(0, pageBytes, 2*pageBytes) // nothing is mapped so low
	err := e.pull(s)
	require.ErrorIs(t, err, status.ParamInvalid)
	require.ErrorIs(t, err, unix.EFAULT)
	require.Equal(t, make([]byte, len(e.own.Bytes())), e.own.Bytes())
	s.Close(errors.New("unlinked"))
	e.close()
}

func TestPrivateMemoryThatCanNotBeReadIsStreamed(t *testing.T) {
	check(t)
	e := newEnds(t)
	for _, c := range []struct {
		name, text string
		change     func(cfg *Config)
	}{
		{"no process", "not visible", func(cfg *Config) { cfg.Pid = 0 }},
		{"another canary", "", func(cfg *Config) {
			o, err := readOffer(cfg.Text)
			require.NoError(t, err)
			o.Canary[3]++
			cfg.Text, err = cbor.Marshal(o)
			require.NoError(t, err)
		}},
		{"a canary that is not mapped", "", func(cfg *Config) {
			o, err := readOffer(cfg.Text)
			require.NoError(t, err)
			o.CanaryAt = pageBytes
			cfg.Text, err = cbor.Marshal(o)
			require.NoError(t, err)
		}},
	} {
		cfg := e.config()
		c.change(&cfg)
		s := e.session(cfg)
		require.Contains(t, s.Explain()[1], "streamed", c.name)
		require.Contains(t, s.Explain()[1], c.text, c.name)
		e.control.streamed = 0
		slot := e.publish(0, e.own.Addr(), e.own.Addr())
		require.NoError(t, e.pull(s))
		require.Equal(t, 1, e.control.streamed, c.name)
		e.theirs.Publisher().Withdraw(slot)

		fill(e.pool.Addr(), 10)
		fill(e.pool.Addr()+4*pageBytes, 20)
		slot = e.publish(1, 0, 4*pageBytes)
		require.NoError(t, e.pull(s), "pools are read all the same")
		e.requirePulled(10, 20)
		require.Equal(t, 1, e.control.streamed, c.name)
		e.theirs.Publisher().Withdraw(slot)
		s.Close(errors.New("unlinked"))
	}
	e.close()
}

func TestOffersThatMakeNoSense(t *testing.T) {
	check(t)
	e := newEnds(t)
	pipe := make([]int, 2)
	replace := func(cfg *Config, i, fd int) {
		require.NoError(t, unix.Close(cfg.FDs[i]))
		cfg.FDs[i] = fd
	}
	loose := func() int { // a memfd that may shrink
		fd, err := unix.MemfdCreate("loose", unix.MFD_CLOEXEC)
		require.NoError(t, err)
		require.NoError(t, unix.Ftruncate(fd, poolBytes))
		return fd
	}
	offering := func(change func(o *offer)) func(cfg *Config) {
		return func(cfg *Config) {
			o, err := readOffer(cfg.Text)
			require.NoError(t, err)
			change(&o)
			cfg.Text, err = cbor.Marshal(o)
			require.NoError(t, err)
		}
	}
	for name, change := range map[string]func(cfg *Config){
		"nothing":                 func(cfg *Config) { cfg.Text = nil },
		"no CBOR":                 func(cfg *Config) { cfg.Text = []byte("\xff\xff") },
		"another type":            func(cfg *Config) { cfg.Text = []byte{0x83, 1, 2, 3} },
		"too many pools":          offering(func(o *offer) { o.Pools = make([]uint64, maxPools+1) }),
		"a short canary":          offering(func(o *offer) { o.Canary = o.Canary[:15] }),
		"a pool without its file": offering(func(o *offer) { o.Pools = append(o.Pools, poolBytes) }),
		"another size":            offering(func(o *offer) { o.Pools[0]++ }),
		"an absurd size":          offering(func(o *offer) { o.Pools[0] = 1 << 63 }),
		"no size":                 offering(func(o *offer) { o.Pools[0] = 0 }),
		"a small directory":       offering(func(o *offer) { o.Directory = pageBytes }),
		"no descriptors":          func(cfg *Config) { closeAll(cfg.FDs); cfg.FDs = nil },
		"another engine's":        func(cfg *Config) { cfg.Incarnation[0]++ },
		"the wrong order":         func(cfg *Config) { cfg.FDs[0], cfg.FDs[1] = cfg.FDs[1], cfg.FDs[0] },
		"a pipe for a pool": func(cfg *Config) {
			require.NoError(t, unix.Pipe2(pipe, unix.O_CLOEXEC))
			require.NoError(t, unix.Close(pipe[1]))
			replace(cfg, 1, pipe[0])
		},
		"a file for a pool": func(cfg *Config) {
			f, err := os.Create(t.TempDir() + "/file")
			require.NoError(t, err)
			require.NoError(t, f.Truncate(poolBytes))
			fd, err := unix.Dup(int(f.Fd()))
			require.NoError(t, err)
			require.NoError(t, f.Close())
			replace(cfg, 1, fd)
		},
		"a pool that may shrink": func(cfg *Config) { replace(cfg, 1, loose()) },
	} {
		cfg := e.config()
		change(&cfg)
		_, err := NewSession(cfg)
		require.Error(t, err, name)
		require.Zero(t, e.control.closed, name)
	}
	e.close()
}

func TestDestinationInAFileIsWrittenByTheKernel(t *testing.T) {
	check(t)
	e := newEnds(t)
	s := e.session(e.config())
	fill(e.pool.Addr(), 10)
	fill(e.pool.Addr()+4*pageBytes, 20)
	e.publish(1, 0, 4*pageBytes)
	fd, err := unix.MemfdCreate("destination", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	require.NoError(t, unix.Ftruncate(fd, 8*pageBytes))
	view, err := unix.Mmap(fd, 0, 8*pageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	req := &transport.Request{
		Key: transport.Key{Kind: transport.KeyNormal, ID: 5},
		Plan: plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1,
			SrcBlocks: []uint64{3, 1}, DstBlocks: []uint64{0, 2}},
		Local: shape,
	}
	addr := reflect.ValueOf(view).Pointer()
	local := transport.Local{Addrs: []uintptr{addr, addr + 4*pageBytes}, Backing: mem.BackingFile}
	require.NoError(t, s.Pull(context.Background(), req, local))
	require.Equal(t, bytes.Repeat([]byte{13}, pageBytes), view[:pageBytes])
	require.NoError(t, unix.Ftruncate(fd, pageBytes)) // a store would be SIGBUS now
	require.ErrorIs(t, s.Pull(context.Background(), req, local), status.ParamInvalid)
	require.NoError(t, unix.Munmap(view))
	require.NoError(t, unix.Close(fd))
	s.Close(errors.New("unlinked"))
	e.close()
}

func TestDeadOwnerIsSeenInItsPages(t *testing.T) {
	check(t)
	e := newEnds(t)
	s := e.session(e.config())
	e.publish(1, 0, 4*pageBytes)
	require.NoError(t, e.pull(s))
	require.Zero(t, e.control.streamed)
	e.theirs.Publisher().MarkDead()
	require.NoError(t, e.pull(s), "the owner has the word")
	require.Equal(t, 1, e.control.streamed)
	s.Close(errors.New("unlinked"))
	e.close()
}
