// SPDX-License-Identifier: Apache-2.0

package cann

// #include "shim.h"
import "C"

import (
	"errors"
	"math"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
)

// Config says what an object is.
type Config struct {
	Name         uint64 // what peers' objects call it; no two that are linked have the same
	Device       int32
	ListenIP     string        // where the library listens for peers' objects
	Timeout      time.Duration // what a pull may take, in whole milliseconds; 0: the library's own default
	LocalCommRes *string       // the library's communication resources; nil: it makes them itself
	// Options are others of the library's, by their documented keys, such as llm.RdmaTrafficClass. Those above come first.
	Options map[string]string
}

// The documented keys of the library.
const (
	keyDevice       = "llm.DeviceId"
	keyListen       = "llm.ListenIpInfo"
	keyTimeout      = "llm.SyncKvCacheWaitTime"
	keyLocalCommRes = "llm.LocalCommRes"
)

const (
	// openTries is how often an object is made, with a new port each time: between our look for a free port and the library's listening
	// somebody else can take it, which does not happen three times in a row by chance.
	openTries = 3
	// unlinkMillis is what the library is told where it asks nobody: no link takes as long to drop.
	unlinkMillis = 5000
	// tensorsPerLayer makes the library's ranges of layers ranges of tensors.
	tensorsPerLayer = 1
	// elementType is one of one byte (DT_INT8), so that a shape is one of bytes.
	elementType = 2
)

// Object is one LlmDataDist of the vendor's library, with the role that both serves and pulls.
type Object struct {
	name   uint64
	port   uint16
	number C.int64_t // of the face's
	close  func() error
}

var _ native.Library = (*Object)(nil)

// Open makes an object that listens. [Load] must have succeeded before.
func Open(config Config) (*Object, error) { return open(config, freePort) }

// open is Open with what finds a port to listen on.
func open(config Config, port func(ip netip.Addr) (uint16, error)) (*Object, error) {
	ip, err := netip.ParseAddr(config.ListenIP)
	if err != nil {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "the address that the library is to listen at: %w", err)
	}
	for try := 1; ; try++ {
		var object *Object
		listen, err := port(ip)
		if err == nil {
			object, err = openAt(config, netip.AddrPortFrom(ip, listen))
		}
		// LLM_FAILED is what the library says of a port that is taken, and of much else.
		if err == nil || try == openTries || !errors.Is(err, status.Failed) {
			return object, err
		}
	}
}

// freePort finds a port that nobody has now.
func freePort(ip netip.Addr) (uint16, error) {
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, 0)))
	if err != nil {
		return 0, status.Newf(status.Failed, status.StageCheck, "find a port for the vendor's library: %w", err)
	}
	defer func() { _ = listener.Close() }() // nobody has connected
	return listener.Addr().(*net.TCPAddr).AddrPort().Port(), nil
}

func openAt(config Config, listen netip.AddrPort) (*Object, error) {
	options, err := packed(config, listen)
	if err != nil {
		return nil, err
	}
	o := &Object{name: config.Name, port: listen.Port()}
	err = call(status.StageCheck, func(refusal *C.cann_error) C.int32_t {
		return C.shim_create(C.uint64_t(config.Name), C.CANN_MIX, C.int32_t(config.Device), &o.number, refusal)
	})
	if err != nil {
		return nil, err
	}
	o.close = sync.OnceValue(o.destroy)
	err = call(status.StageCheck, func(refusal *C.cann_error) C.int32_t {
		return C.shim_initialize(o.number, (*C.uint8_t)(&options[0]), C.uint64_t(len(options)), refusal)
	})
	if err != nil {
		_ = o.close() // there is one failure to tell, and it came first
		return nil, err
	}
	return o, nil
}

// packed is the library's options as the face reads them: keys and values in turn, each ended by a zero byte. A later one of the same key
// counts.
func packed(config Config, listen netip.AddrPort) ([]byte, error) {
	var words []string
	for key, value := range config.Options {
		words = append(words, key, value)
	}
	words = append(words, keyDevice, strconv.Itoa(int(config.Device)), keyListen, listen.String())
	if config.Timeout != 0 {
		words = append(words, keyTimeout, strconv.Itoa(int(millis(config.Timeout))))
	}
	if config.LocalCommRes != nil {
		words = append(words, keyLocalCommRes, *config.LocalCommRes)
	}
	for _, word := range words {
		if strings.Contains(word, "\x00") {
			return nil, status.Newf(status.ParamInvalid, status.StageCheck, "an option of the library's has a zero byte: %q", word)
		}
	}
	return []byte(strings.Join(words, "\x00") + "\x00"), nil
}

// millis rounds up to what the library takes: 1 ms to 24 days.
func millis(d time.Duration) C.int32_t {
	d = min(d, math.MaxInt32*time.Millisecond)
	return C.int32_t(max(1, (d+time.Millisecond-1)/time.Millisecond))
}

// Name implements native.Library.
func (o *Object) Name() uint64 { return o.name }

// Port implements native.Library.
func (o *Object) Port() uint16 { return o.port }

// Register implements native.Library. The library knows a tensor as rows of bytes, whether a peer calls them rows or blocks.
func (o *Object) Register(shape plan.Shape, onDevice bool, addrs []uintptr) (int64, error) {
	if len(addrs) == 0 || shape.Count > math.MaxInt64 || shape.Stride > math.MaxInt64 {
		return 0, status.Newf(status.ParamInvalid, status.StageRegister, "the library can't be told of %d tensors of %d times %d bytes",
			len(addrs), shape.Count, shape.Stride)
	}
	description := C.cann_description{
		placement: C.CANN_ON_HOST, num_tensors: C.uint32_t(len(addrs)), data_type: elementType, rank: 2,
	}
	if onDevice {
		description.placement = C.CANN_ON_DEVICE
	}
	description.shape[0], description.shape[1] = C.int64_t(shape.Count), C.int64_t(shape.Stride)
	numbers := make([]C.uint64_t, len(addrs))
	for i, addr := range addrs {
		numbers[i] = C.uint64_t(addr)
	}
	var id C.int64_t
	err := call(status.StageRegister, func(refusal *C.cann_error) C.int32_t {
		return C.shim_register(o.number, &description, &numbers[0], C.uint64_t(len(numbers)), &id, refusal)
	})
	return int64(id), err
}

// Unregister implements native.Library.
func (o *Object) Unregister(id int64) error {
	return call(status.StageRegister, func(refusal *C.cann_error) C.int32_t {
		return C.shim_unregister(o.number, C.int64_t(id), refusal)
	})
}

// Link implements native.Library.
func (o *Object) Link(peer uint64, local netip.Addr, remote netip.AddrPort, timeout time.Duration) error {
	cluster := C.cann_cluster{cluster_id: C.uint64_t(peer), remote_port: C.uint16_t(remote.Port())}
	if local.IsValid() {
		address(&cluster.local_ip, local)
	}
	address(&cluster.remote_ip, remote.Addr())
	return call(status.StageDial, func(refusal *C.cann_error) C.int32_t {
		return C.shim_link(o.number, &cluster, millis(timeout), refusal)
	})
}

// Unlink implements native.Library, by force: it is this end's own affair.
func (o *Object) Unlink(peer uint64) error {
	cluster := C.cann_cluster{cluster_id: C.uint64_t(peer)}
	return call(status.StageClose, func(refusal *C.cann_error) C.int32_t {
		return C.shim_unlink(o.number, &cluster, unlinkMillis, refusal)
	})
}

// address writes ip, which has no zone then: each text of such an address has room, and a zero byte behind it.
func address(room *[46]C.char, ip netip.Addr) {
	for i, b := range []byte(ip.Unmap().WithZone("").String()) {
		room[i] = C.char(b)
	}
}

// Pull implements native.Library.
func (o *Object) Pull(transfer *native.Transfer) error {
	given, err := transferred(transfer)
	if err != nil {
		return err
	}
	src, dst := transfer.SrcBlocks, transfer.DstBlocks
	return call(status.StageTransfer, func(refusal *C.cann_error) C.int32_t {
		if len(src) == 0 && len(dst) == 0 {
			return C.shim_pull_cache(o.number, &given, refusal)
		}
		return C.shim_pull_blocks(o.number, &given, list(src), C.uint64_t(len(src)), list(dst), C.uint64_t(len(dst)), refusal)
	})
}

// list is where the numbers of a list begin.
func list(numbers []uint64) *C.uint64_t {
	if len(numbers) == 0 {
		return nil
	}
	return (*C.uint64_t)(&numbers[0])
}

func transferred(t *native.Transfer) (C.cann_transfer, error) {
	if t.RemoteRow > math.MaxUint32 || t.LocalRow > math.MaxUint32 || t.Bytes > math.MaxInt64 {
		return C.cann_transfer{}, status.Newf(status.ParamInvalid, status.StageTransfer,
			"the library can't be told of %d bytes of rows %d and %d", t.Bytes, t.RemoteRow, t.LocalRow)
	}
	given := C.cann_transfer{
		cluster_id: C.uint64_t(t.Peer), remote_cache: C.int64_t(t.Remote), local_cache: C.int64_t(t.Local),
		remote_batch: C.uint32_t(t.RemoteRow), local_batch: C.uint32_t(t.LocalRow), bytes: C.int64_t(t.Bytes),
		src_first_layer: -1, src_last_layer: -1, dst_first_layer: -1, dst_last_layer: -1, tensors_per_layer: tensorsPerLayer,
	}
	src, dst := t.SrcTensors, t.DstTensors
	if src.All && dst.All {
		return given, nil
	}
	// The library heeds ranges only where both are there. One that is all tensors is as long as the other.
	if src.All {
		src = plan.Range{Count: dst.Count, Parts: dst.Parts}
	} else if dst.All {
		dst = plan.Range{Count: src.Count, Parts: src.Parts}
	}
	for _, side := range []plan.Range{src, dst} {
		if side.Parts > 1 || side.Count == 0 || uint64(side.First)+uint64(side.Count) > math.MaxInt32 {
			return C.cann_transfer{}, status.Newf(status.ParamInvalid, status.StageTransfer,
				"the library can't be told of %d tensors from %d in %d parts", side.Count, side.First, max(1, side.Parts))
		}
	}
	given.src_first_layer, given.src_last_layer = C.int32_t(src.First), C.int32_t(src.First+src.Count-1)
	given.dst_first_layer, given.dst_last_layer = C.int32_t(dst.First), C.int32_t(dst.First+dst.Count-1)
	return given, nil
}

// Close implements native.Library. Closing twice is fine; calls of a closed object are status.Failed.
func (o *Object) Close() error { return o.close() }

func (o *Object) destroy() error {
	return call(status.StageClose, func(refusal *C.cann_error) C.int32_t { return C.shim_destroy(o.number, refusal) })
}
