// SPDX-License-Identifier: Apache-2.0

package cann

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/capi/cann/internal/standin"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
)

var loopback = netip.MustParseAddr("127.0.0.1")

const (
	ownerName, pullerName = uint64(1) << 40, uint64(7)

	// linkTimeout is for a machine that does much else meanwhile.
	linkTimeout = 20 * time.Second
	// stall, in ms, outlasts a test, which ends it itself.
	stall = 600_000
)

func opened(t *testing.T, config Config) *Object {
	t.Helper()
	config.ListenIP = loopback.String()
	if config.Timeout == 0 {
		config.Timeout = linkTimeout
	}
	o, err := Open(config)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, o.Close()) })
	return o
}

// pair is an object that owns caches, and one that pulls from it once they are linked.
type pair struct {
	t             *testing.T
	owner, puller *Object
}

func newPair(t *testing.T) *pair {
	t.Helper()
	tidy(t)
	return &pair{t, opened(t, Config{Name: ownerName}), opened(t, Config{Name: pullerName})}
}

func (p *pair) link() {
	p.t.Helper()
	require.NoError(p.t, p.puller.Link(ownerName, loopback, netip.AddrPortFrom(loopback, p.owner.Port()), linkTimeout))
}

// registered is a cache of an object, and what is in it.
type registered struct {
	t        *testing.T
	id       int64
	onDevice bool
	addrs    []uintptr
	content  [][]byte // of each tensor
	shape    plan.Shape
}

func register(t *testing.T, o *Object, onDevice bool, tensors int, count, stride uint64) *registered {
	t.Helper()
	c := &registered{t: t, onDevice: onDevice, shape: plan.Shape{
		Kind: plan.Contiguous, Tensors: uint32(tensors), TensorBytes: count * stride, Stride: stride, Count: count,
	}}
	for i := range tensors {
		memory := reserve(t, onDevice, int(count*stride))
		c.addrs = append(c.addrs, memory.Addr())
		c.content = append(c.content, noise(int(count*stride), o.Name()<<8+uint64(i)))
		write(t, memory.Addr(), onDevice, c.content[i])
	}
	id, err := o.Register(c.shape, onDevice, c.addrs)
	require.NoError(t, err)
	require.Positive(t, id)
	c.id = id
	return c
}

// expect notes what a pull brings to a tensor.
func (c *registered) expect(tensor int, at uint64, piece []byte) {
	copy(c.content[tensor][at:], piece)
}

func (c *registered) part(tensor int, at, bytes uint64) []byte {
	return c.content[tensor][at : at+bytes]
}

// check compares every byte of the cache.
func (c *registered) check() {
	c.t.Helper()
	for i, addr := range c.addrs {
		require.Equal(c.t, c.content[i], fetch(c.t, addr, c.onDevice, len(c.content[i])), "tensor %d", i)
	}
}

var all = plan.Range{All: true}

// placements runs a test for each placement of the two ends.
func placements(t *testing.T, run func(t *testing.T, fromDevice, toDevice bool)) {
	for _, from := range []bool{false, true} {
		for _, to := range []bool{false, true} {
			t.Run(fmt.Sprintf("device %t to device %t", from, to), func(t *testing.T) { run(t, from, to) })
		}
	}
}

func TestPullOfRows(t *testing.T) {
	placements(t, func(t *testing.T, fromDevice, toDevice bool) {
		const stride = 96
		p := newPair(t)
		remote, local := register(t, p.owner, fromDevice, 3, 4, stride), register(t, p.puller, toDevice, 3, 3, stride)
		p.link()
		for _, row := range []struct{ remote, local, bytes uint64 }{{2, 1, stride}, {3, 0, 50}, {0, 2, 1}} {
			require.NoError(t, p.puller.Pull(&native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id,
				RemoteRow: row.remote, LocalRow: row.local, Bytes: row.bytes, SrcTensors: all, DstTensors: all}))
			for i := range 3 {
				local.expect(i, row.local*stride, remote.part(i, row.remote*stride, row.bytes))
			}
			local.check()
			remote.check()
		}
	})
}

func TestPullOfBlocks(t *testing.T) {
	placements(t, func(t *testing.T, fromDevice, toDevice bool) {
		const block = 64
		p := newPair(t)
		remote, local := register(t, p.owner, fromDevice, 2, 10, block), register(t, p.puller, toDevice, 2, 8, block)
		p.link()
		src, dst := []uint64{4, 5, 6, 0, 9}, []uint64{1, 2, 3, 7, 0}
		require.NoError(t, p.puller.Pull(&native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id,
			SrcTensors: all, DstTensors: all, SrcBlocks: src, DstBlocks: dst}))
		for i := range 2 {
			for k := range src {
				local.expect(i, dst[k]*block, remote.part(i, src[k]*block, block))
			}
		}
		local.check()
		remote.check()
	})
}

func TestPullOfTensorRanges(t *testing.T) {
	const stride = 32
	for _, c := range []struct {
		what     string
		src, dst plan.Range
		from, to int // the first tensors
		count    int
	}{
		{"two of four to others", plan.Range{First: 2, Count: 2}, plan.Range{First: 0, Count: 2, Parts: 1}, 2, 0, 2},
		{"the last one", plan.Range{First: 3, Count: 1}, plan.Range{First: 1, Count: 1}, 3, 1, 1},
		{"some to all", plan.Range{First: 1, Count: 3}, all, 1, 0, 3},
	} {
		for _, blocks := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, blocks %t", c.what, blocks), func(t *testing.T) {
				p := newPair(t)
				remote, local := register(t, p.owner, true, 4, 2, stride), register(t, p.puller, true, 3, 2, stride)
				p.link()
				transfer := native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id, SrcTensors: c.src, DstTensors: c.dst,
					RemoteRow: 1, LocalRow: 0, Bytes: stride}
				if blocks {
					transfer.RemoteRow, transfer.Bytes = 0, 0
					transfer.SrcBlocks, transfer.DstBlocks = []uint64{1}, []uint64{0}
				}
				require.NoError(t, p.puller.Pull(&transfer))
				for i := range c.count {
					local.expect(c.to+i, 0, remote.part(c.from+i, stride, stride))
				}
				local.check()
			})
		}
	}
	t.Run("all to some", func(t *testing.T) {
		p := newPair(t)
		remote, local := register(t, p.owner, true, 2, 1, stride), register(t, p.puller, false, 5, 1, stride)
		p.link()
		require.NoError(t, p.puller.Pull(&native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id, Bytes: stride,
			SrcTensors: all, DstTensors: plan.Range{First: 3, Count: 2}}))
		for i := range 2 {
			local.expect(3+i, 0, remote.part(i, 0, stride))
		}
		local.check()
	})
}

func TestPullOfWhatTheLibraryCannotBeTold(t *testing.T) {
	o := opened(t, Config{Name: pullerName})
	for what, transfer := range map[string]native.Transfer{
		"row 4294967296 of the peer": {RemoteRow: math.MaxUint32 + 1, SrcTensors: all, DstTensors: all},
		"row 4294967296":             {LocalRow: math.MaxUint32 + 1, SrcTensors: all, DstTensors: all},
		"more bytes than there are":  {Bytes: math.MaxInt64 + 1, SrcTensors: all, DstTensors: all},
		"parts":                      {SrcTensors: plan.Range{Count: 1, Parts: 2}, DstTensors: plan.Range{Count: 1, Parts: 2}},
		"no tensors":                 {SrcTensors: plan.Range{}, DstTensors: plan.Range{}},
		"tensors beyond an int32":    {SrcTensors: plan.Range{First: math.MaxInt32, Count: 1}, DstTensors: plan.Range{Count: 1}},
	} {
		t.Run(what, func(t *testing.T) {
			err := o.Pull(&transfer)
			require.ErrorIs(t, err, status.ParamInvalid)
			require.ErrorContains(t, err, "the library can't be told of")
		})
	}
	_, err := o.Register(plan.Shape{Count: 1, Stride: math.MaxInt64 + 1}, true, []uintptr{1})
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = o.Register(plan.Shape{Count: 1, Stride: 1}, true, nil)
	require.ErrorIs(t, err, status.ParamInvalid)
	err = o.Pull(&native.Transfer{SrcTensors: all, DstTensors: all, SrcBlocks: []uint64{0}})
	require.ErrorIs(t, err, status.ParamInvalid, "the library's own refusal of lists that differ")
	require.ErrorContains(t, err, "PullKvBlocks: LLM_PARAM_INVALID (0x5010B005)")
	_, err = o.Register(plan.Shape{Count: 1, Stride: 1}, true, make([]uintptr, 3))
	require.ErrorIs(t, err, status.ParamInvalid, "the library's own refusal of an address 0")
	require.ErrorContains(t, err, "RegisterKvCache: LLM_PARAM_INVALID (0x5010B005)")
}

// TestPullSeesWhatWasRegisteredBeforeTheFirst holds the stand-in, and so what is built on it, to the library's own rule.
func TestPullSeesWhatWasRegisteredBeforeTheFirst(t *testing.T) {
	const stride = 16
	p := newPair(t)
	early, local := register(t, p.owner, true, 1, 1, stride), register(t, p.puller, true, 1, 1, stride)
	p.link()
	pull := func(remote *registered) error {
		return p.puller.Pull(&native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id, Bytes: stride, SrcTensors: all, DstTensors: all})
	}
	require.NoError(t, pull(early))
	local.expect(0, 0, early.content[0])
	late := register(t, p.owner, true, 1, 2, stride)
	require.Greater(t, late.id, early.id)
	require.ErrorIs(t, pull(late), status.CacheNotExist)
	local.check()

	require.NoError(t, p.puller.Unlink(ownerName))
	require.ErrorIs(t, pull(late), status.NotYetLink)
	p.link()
	require.NoError(t, pull(late))
	local.expect(0, 0, late.part(0, 0, stride))
	local.check()

	require.NoError(t, p.puller.Unregister(local.id))
	require.ErrorIs(t, pull(late), status.CacheNotExist)
	require.NoError(t, p.puller.Unregister(local.id), "an unknown id is fine")
	require.NoError(t, p.puller.Unlink(ownerName))
	require.NoError(t, p.puller.Unlink(ownerName), "no link is fine")
}

func TestPullWorksBothWaysAtOnce(t *testing.T) {
	const stride, rows, callers = 4096, 8, 4
	p := newPair(t)
	caches := map[*Object][]*registered{}
	for range callers {
		for _, o := range []*Object{p.owner, p.puller} {
			caches[o] = append(caches[o], register(t, o, true, 2, rows, stride))
		}
	}
	source := map[*Object]*registered{}
	for _, o := range []*Object{p.owner, p.puller} {
		source[o] = register(t, o, false, 2, rows, stride)
	}
	p.link()
	var callersDone sync.WaitGroup
	failures := make(chan error, 2*callers)
	for here, there := range map[*Object]*Object{p.owner: p.puller, p.puller: p.owner} {
		for _, local := range caches[here] {
			callersDone.Go(func() {
				for row := range uint64(rows) {
					err := here.Pull(&native.Transfer{Peer: there.Name(), Remote: source[there].id, Local: local.id,
						RemoteRow: rows - 1 - row, LocalRow: row, Bytes: stride, SrcTensors: all, DstTensors: all})
					if err != nil {
						failures <- err
						return
					}
					for i := range 2 {
						local.expect(i, row*stride, source[there].part(i, (rows-1-row)*stride, stride))
					}
				}
			})
		}
	}
	callersDone.Wait()
	close(failures)
	for err := range failures {
		require.NoError(t, err)
	}
	for _, o := range []*Object{p.owner, p.puller} {
		for _, local := range caches[o] {
			local.check()
		}
	}
}

func TestPullEndsAtTheTimeout(t *testing.T) {
	tidy(t)
	p := &pair{t, opened(t, Config{Name: ownerName}), opened(t, Config{Name: pullerName, Timeout: 30 * time.Millisecond})}
	remote, local := register(t, p.owner, true, 1, 1, 8), register(t, p.puller, true, 1, 1, 8)
	p.link()
	planFaults(t, fmt.Sprintf("serve=stall:0:%d", stall))
	pull := native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id, Bytes: 8, SrcTensors: all, DstTensors: all}
	require.ErrorIs(t, p.puller.Pull(&pull), status.Timeout)
	require.Eventually(t, func() bool { return standin.Waiting() == 1 }, linkTimeout, time.Millisecond)
	standin.Release()
	require.ErrorIs(t, p.puller.Pull(&pull), status.SuspectRemoteError)
	local.check()
}

func TestLinkFailures(t *testing.T) {
	p := newPair(t)
	err := p.puller.Link(ownerName, loopback, netip.AddrPortFrom(loopback, taken(t)), 50*time.Millisecond)
	require.ErrorIs(t, err, status.Timeout)
	require.Equal(t, status.StageDial, status.From(err, "").Stage)
	free, err := freePort(loopback)
	require.NoError(t, err)
	require.ErrorIs(t, p.puller.Link(ownerName, loopback, netip.AddrPortFrom(loopback, free), linkTimeout), status.LinkFailed)
	six := netip.MustParseAddr("2001:db8:1234:5678:9abc:def0:1234:5678%interface")
	require.ErrorIs(t, p.puller.Link(ownerName, six, netip.AddrPortFrom(six, 1), linkTimeout), status.ParamInvalid)
	p.link()
	require.ErrorIs(t, p.puller.Link(ownerName, netip.Addr{}, netip.AddrPortFrom(loopback, p.owner.Port()), linkTimeout), status.AlreadyLink)
	require.ErrorIs(t, p.puller.Pull(&native.Transfer{Peer: 4, Local: 4, Bytes: 1, SrcTensors: all, DstTensors: all}), status.CacheNotExist)
}

// taken is a port that somebody else listens on, who never answers.
func taken(t *testing.T) uint16 {
	t.Helper()
	listener, err := net.Listen("tcp", loopback.String()+":0")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, listener.Close()) })
	return listener.Addr().(*net.TCPAddr).AddrPort().Port()
}

func TestOpenTriesAnotherPort(t *testing.T) {
	tidy(t)
	var tried []uint16
	ports := func(first uint16) func(ip netip.Addr) (uint16, error) {
		tried = nil
		return func(ip netip.Addr) (uint16, error) {
			port, err := first, error(nil)
			if len(tried) > 0 {
				port, err = freePort(ip)
			}
			tried = append(tried, port)
			return port, err
		}
	}
	config := Config{Name: 3, ListenIP: loopback.String()}
	somebodys := taken(t)
	o, err := open(config, ports(somebodys))
	require.NoError(t, err)
	require.Len(t, tried, 2)
	require.Equal(t, tried[1], o.Port())
	require.Equal(t, uint64(3), o.Name())
	require.NoError(t, o.Close())

	_, err = open(config, func(netip.Addr) (uint16, error) { tried = append(tried, somebodys); return somebodys, nil })
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "Initialize: LLM_FAILED (0xFFFFFFFF)")
	require.Len(t, tried, 2+openTries)

	planFaults(t, "Initialize=fail:0x5010B005")
	_, err = open(config, ports(0))
	require.ErrorIs(t, err, status.ParamInvalid)
	require.Len(t, tried, 1, "what is wrong with the options is so with every port")
}

func TestOpenFailures(t *testing.T) {
	tidy(t)
	listen := func(config Config) error {
		config.ListenIP = loopback.String()
		_, err := Open(config)
		return err
	}
	_, err := Open(Config{ListenIP: "localhost"})
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = Open(Config{ListenIP: "203.0.113.1"})
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "find a port for the vendor's library")
	require.ErrorContains(t, listen(Config{Device: 9}), "aclrtSetDevice(9)")
	require.ErrorIs(t, listen(Config{Options: map[string]string{"llm.TransferBackend": "other"}}), status.ParamInvalid)
	require.ErrorIs(t, listen(Config{Options: map[string]string{"llm.Key": "with\x00zero"}}), status.ParamInvalid)
	require.NoError(t, opened(t, Config{Options: map[string]string{keyDevice: "9", keyListen: "nowhere"}}).Close(), "the fields come first")
}

func TestOptionsAsTheyAreHandedOver(t *testing.T) {
	resources := ""
	options, err := packed(Config{
		Device: 3, Timeout: 29*time.Millisecond + 1, LocalCommRes: &resources, Options: map[string]string{"llm.RdmaTrafficClass": "132"},
	}, netip.MustParseAddrPort("[fe80::1]:26000"))
	require.NoError(t, err)
	require.Equal(t, "llm.RdmaTrafficClass\x00132\x00llm.DeviceId\x003\x00llm.ListenIpInfo\x00[fe80::1]:26000\x00"+
		"llm.SyncKvCacheWaitTime\x0030\x00llm.LocalCommRes\x00\x00", string(options))
	options, err = packed(Config{}, netip.MustParseAddrPort("127.0.0.1:1"))
	require.NoError(t, err)
	require.Equal(t, "llm.DeviceId\x000\x00llm.ListenIpInfo\x00127.0.0.1:1\x00", string(options))

	for given, want := range map[time.Duration]int{-time.Second: 1, 0: 1, 1: 1, time.Millisecond: 1, math.MaxInt64: math.MaxInt32} {
		require.Equal(t, want, int(millis(given)), given)
	}
}

func TestOpenHandsTheCommunicationResourcesOver(t *testing.T) {
	tidy(t)
	for resources, code := range map[string]status.Code{`{"version":"1.2"}`: status.Success, `{}`: status.ParamInvalid} {
		owner, puller := opened(t, Config{Name: ownerName}), opened(t, Config{Name: pullerName, LocalCommRes: &resources})
		err := puller.Link(ownerName, loopback, netip.AddrPortFrom(loopback, owner.Port()), linkTimeout)
		require.Equal(t, code, status.CodeOf(err), resources)
		require.NoError(t, owner.Close())
		require.NoError(t, puller.Close())
	}
}

func TestCloseWaitsForCallsUnderWay(t *testing.T) {
	p := newPair(t)
	remote, local := register(t, p.owner, true, 1, 1, 8), register(t, p.puller, true, 1, 1, 8)
	p.link()
	planFaults(t, fmt.Sprintf("PullKvCache=stall:0:%d", stall))
	pulled, closed := make(chan error, 1), make(chan error, 1)
	go func() {
		pulled <- p.puller.Pull(&native.Transfer{Peer: ownerName, Remote: remote.id, Local: local.id, Bytes: 8, SrcTensors: all, DstTensors: all})
	}()
	require.Eventually(t, func() bool { return standin.Waiting() == 1 }, linkTimeout, time.Millisecond)
	go func() { closed <- p.puller.Close() }()
	// The face forgets the object first, so that a call is refused once closing is under way.
	require.Eventually(t, func() bool { return p.puller.Unregister(99) != nil }, linkTimeout, time.Millisecond)
	require.Equal(t, 1, standin.Waiting())
	require.Empty(t, closed)
	require.Empty(t, pulled)
	standin.Release()
	require.NoError(t, <-pulled)
	require.NoError(t, <-closed)
	local.expect(0, 0, remote.content[0])
	local.check()
}

func TestCallsAfterCloseAreErrors(t *testing.T) {
	tidy(t)
	o := opened(t, Config{Name: 5})
	require.NoError(t, o.Close())
	require.NoError(t, o.Close())
	_, registered := o.Register(plan.Shape{Count: 1, Stride: 1}, true, []uintptr{1})
	transfer := native.Transfer{SrcTensors: all, DstTensors: all}
	blocks := transfer
	blocks.SrcBlocks, blocks.DstBlocks = []uint64{0}, []uint64{0}
	for _, err := range []error{
		registered, o.Unregister(1), o.Link(6, loopback, netip.AddrPortFrom(loopback, 1), time.Second), o.Unlink(6),
		o.Pull(&transfer), o.Pull(&blocks),
	} {
		require.ErrorIs(t, err, status.Failed)
		require.ErrorContains(t, err, "no object has the number")
	}
}

// TestBothStringABIs runs the transfers with face and library built for each of the two C++ string ABIs: a vendor's library has either.
func TestBothStringABIs(t *testing.T) {
	for _, c := range []struct{ face, library string }{{"0", "0"}, {"0", "1"}, {"1", "0"}} {
		t.Run("face "+c.face+", library "+c.library, func(t *testing.T) {
			face, err := built(c.face)
			require.NoError(t, err)
			library, err := built(c.library)
			require.NoError(t, err)
			out := child(t, "/proc/self/exe", []string{faceVariable + "=" + filepath.Join(face, faceFile), folderVariable + "=" + library},
				"-test.v", "-test.run=^TestPull")
			for _, test := range []string{"OfRows", "OfBlocks", "OfTensorRanges", "SeesWhatWasRegisteredBeforeTheFirst"} {
				require.Contains(t, out, "--- PASS: TestPull"+test)
			}
			require.Equal(t, 4, strings.Count(out, "--- PASS: TestPullOfRows/"))
		})
	}
}
