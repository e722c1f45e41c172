// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// An owner in a process of its own: this test binary, started again. It has two caches of blocks, one in its pool (model 0) and one in
// memory of its own (model 1), and does what it is told on its standard input until that ends.

const (
	ownerVariable = "LLM_DATADIST_TEST_OWNER" // holds the transport
	ownerCluster  = 1
	pullerCluster = 2
	ownerTensors  = 4
	ownerBlocks   = 512
	ownerBlock    = 16 << 10
)

var ownerDesc = cache.Desc{
	Kind: plan.Blocks, Tensors: ownerTensors, Dims: []int64{ownerBlocks, ownerBlock}, ElementBytes: 1, Placement: cache.Device,
}

// ownersByte is the content of a block.
func ownersByte(model uint64, tensor, block int) byte {
	return byte(int(model)*101 + tensor*31 + block*7 + 1)
}

func fillOwned(addrs []uintptr, model uint64) {
	for t, addr := range addrs {
		view := mem.View(addr, ownerBlocks*ownerBlock)
		for b := range ownerBlocks {
			block := view[b*ownerBlock:][:ownerBlock]
			for i := range block {
				block[i] = ownersByte(model, t, b)
			}
		}
	}
}

// beOwner is the owner's process.
func beOwner() int {
	e, err := New(ownerCluster, Options{
		CacheManager: true, SyncTimeout: time.Minute, TCPConnections: 2, CopyThreads: 2, PeerDead: patient,
		DevicePool: poolOf(64 << 20), Transport: os.Getenv(ownerVariable), HasListen: true, ListenIP: "127.0.0.1", ListenPort: "0",
	}, Parts{Device: mem.Host(), Network: TCP()})
	if err == nil {
		err = serveOwner(e)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func serveOwner(e *Engine) error {
	id, addrs, err := e.Allocate(ownerDesc, []cache.Key{{ID: cache.NoID}})
	if err != nil {
		return err
	}
	fillOwned(addrs, 0)
	private, err := mem.NewBuffer(ownerTensors * ownerBlocks * ownerBlock)
	if err != nil {
		return err
	}
	var own []uintptr
	for t := range ownerTensors {
		own = append(own, private.Addr()+uintptr(t*ownerBlocks*ownerBlock))
	}
	fillOwned(own, 1)
	if _, err := e.Register(ownerDesc, own, []cache.Key{{ID: cache.NoID, Model: 1}}, true); err != nil {
		return err
	}
	fmt.Println(e.ListenAddress())
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		switch in.Text() {
		case "drop": // the cache goes, and its memory is another's
			if err = e.Unregister(context.Background(), id); err == nil {
				id, addrs, err = e.Allocate(ownerDesc, []cache.Key{{ID: cache.NoID, Model: 9}})
			}
			if err == nil {
				clear(mem.View(addrs[0], ownerBlocks*ownerBlock))
			}
		case "push": // to who has linked
			err = pushOwned(e, id)
		case "pushing": // the same for as long as it works
			go func() {
				for pushOwned(e, id) == nil {
				}
			}()
		}
		if err != nil {
			return err
		}
		fmt.Println("done")
	}
	return e.Close()
}

// pushOwned pushes a whole cache of blocks to the first cache of a puller.
func pushOwned(e *Engine, id int64) error {
	ctx, cancel := within(patient)
	defer cancel()
	return e.Push(ctx, &PushCall{
		Cluster: pullerCluster, Key: transport.Key{Kind: transport.KeyCache, CacheID: 1}, Cache: id, TensorsPerLayer: ownerTensors,
		Plan: plan.Request{SrcTensors: everything, DstTensors: everything, SrcBlocks: allBlocks(), DstBlocks: allBlocks()},
	})
}

// owning is an owner's process as the test sees it.
type owning struct {
	t       testing.TB
	command *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
	address string
}

func startOwner(t testing.TB, transport string) *owning {
	o := &owning{t: t, command: exec.Command(os.Args[0])}
	o.command.Env = append(os.Environ(), ownerVariable+"="+transport)
	o.command.Stderr = os.Stderr
	var err error
	o.in, err = o.command.StdinPipe()
	require.NoError(t, err)
	out, err := o.command.StdoutPipe()
	require.NoError(t, err)
	o.out = bufio.NewReader(out)
	require.NoError(t, o.command.Start())
	o.address = o.line()
	return o
}

func (o *owning) line() string {
	text, err := o.out.ReadString('\n')
	require.NoError(o.t, err)
	return strings.TrimSpace(text)
}

// tell makes the owner do something and waits until it has.
func (o *owning) tell(what string) {
	_, err := io.WriteString(o.in, what+"\n")
	require.NoError(o.t, err)
	require.Equal(o.t, "done", o.line())
}

// leave ends the owner in good order.
func (o *owning) leave() {
	require.NoError(o.t, o.in.Close())
	require.NoError(o.t, o.command.Wait())
}

func (o *owning) signal(what syscall.Signal) { require.NoError(o.t, o.command.Process.Signal(what)) }

// stop stops the owner, and returns when it stands; resume lets it go on.
func (o *owning) stop()   { testkit.Stop(o.t, o.command.Process.Pid) }
func (o *owning) resume() { o.signal(syscall.SIGCONT) }

// kill ends the owner at once, and returns when the process is gone.
func (o *owning) kill() {
	o.signal(syscall.SIGKILL)
	_ = o.command.Wait() // "signal: killed"
}

// pulling is an engine that is linked to an owner, with a cache of the same shape.
type pulling struct {
	*Engine
	t      testing.TB
	buffer *mem.Buffer
	addrs  []uintptr
	id     int64
}

func (o *owning) puller(transport string, timeout time.Duration) *pulling {
	e, err := New(pullerCluster, Options{
		CacheManager: true, SyncTimeout: timeout, TCPConnections: 2, CopyThreads: 2, PeerDead: patient, Transport: transport,
	}, Parts{Device: mem.Host(), Network: TCP()})
	require.NoError(o.t, err)
	p := &pulling{Engine: e, t: o.t}
	p.buffer, err = mem.NewBuffer(ownerTensors * ownerBlocks * ownerBlock)
	require.NoError(o.t, err)
	for t := range ownerTensors {
		p.addrs = append(p.addrs, p.buffer.Addr()+uintptr(t*ownerBlocks*ownerBlock))
	}
	p.id, err = e.Register(ownerDesc, p.addrs, nil, true)
	require.NoError(o.t, err)
	require.NoError(o.t, p.link(o.address))
	return p
}

func (p *pulling) link(address string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	id := uint64(ownerCluster)
	return p.LinkClusters(ctx, []Cluster{{ID: &id, Remote: []string{address}, Local: []string{"127.0.0.1"}}})[0]
}

func (p *pulling) close() {
	require.NoError(p.t, p.Close())
	require.NoError(p.t, p.buffer.Free())
}

// call describes a pull of blocks src of a model into blocks dst.
func (p *pulling) call(model uint64, src, dst []uint64) *PullCall {
	return &PullCall{
		Cluster: ownerCluster, Key: transport.Key{Kind: transport.KeyNormal, ID: cache.NoID, Model: model}, Cache: p.id,
		Plan: plan.Request{SrcTensors: plan.Range{All: true}, DstTensors: plan.Range{All: true}, Size: -1, SrcBlocks: src, DstBlocks: dst},
	}
}

func (p *pulling) pull(call *PullCall, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return p.Pull(ctx, call)
}

// requireBlock checks a block of every tensor against the owner's.
func (p *pulling) requireBlock(model uint64, src, dst int) {
	for t, addr := range p.addrs {
		for i, b := range mem.View(addr+uintptr(dst*ownerBlock), ownerBlock) {
			if b != ownersByte(model, t, src) {
				require.Failf(p.t, "wrong bytes", "tensor %d, block %d, byte %d", t, dst, i)
			}
		}
	}
}
