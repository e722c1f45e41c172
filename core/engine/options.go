// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Options are the settings of one engine, as read from the options dict of LLMDataDist.init and from the environment.
type Options struct {
	CacheManager bool          // llm.EnableCacheManager: cache-manager mode, else v1 mode
	OneSided     bool          // llm.EnableRemoteCacheAccessible
	Directional  bool          // llm.TransferBackend = hixl: links belong to the end that made them
	SyncTimeout  time.Duration // llm.SyncKvCacheWaitTime: deadline of a transfer
	ListenIP     string        // llm.ListenIp
	ListenPort   string        // llm.ListenPort
	HasListen    bool
	LocalCommRes *string // llm.LocalCommRes; nil: absent
	DevicePool   *cache.PoolConfig
	HostPool     *cache.PoolConfig
	LinkTotal    time.Duration // llm.LinkTotalTime: how long link() may prepare a group
	LinkTries    int           // llm.LinkRetryCount: over how many attempts that is divided

	Device         string // open.Device: auto, host, cann; "" is auto
	DeviceID       int32  // ge.exec.deviceId, the first one
	SeveralDevices bool   // there are more of them
	// LibraryOptions are those that a vendor's library honours, by their keys: llm.RdmaTrafficClass, llm.RdmaServiceLevel.
	LibraryOptions map[string]string
	LibraryPath    string        // open.CannPath: where the vendor's library is looked for; "": in its documented places
	Transport      string        // open.Transport: auto or the one that is required
	CopyThreads    int           // open.CopyThreads
	TCPConnections int           // open.TcpConnections: data connections of a link
	PeerDead       time.Duration // open.PeerDeadMillis
	RendezvousPort uint16        // open.RendezvousPort; 0: 16666 + the device id of rank 0
	Spin           time.Duration // open.SpinMicros: how long a waiting tcp call spins before it sleeps; 0: as the transport thinks best

	Loopback        bool // open.Fabric = loopback: this engine itself stands for every other cluster
	MultipleEngines bool // open.MultipleEngines: its process may have others that say so too, which Python sees to
}

// required is the one transport that may be used; "" for any.
func (o *Options) required() string {
	if o.Transport == "auto" {
		return ""
	}
	return o.Transport
}

// The option keys of spec §10 that the engine reads.
const (
	keyCacheManager   = "llm.EnableCacheManager"
	keyOneSided       = "llm.EnableRemoteCacheAccessible"
	keyBackend        = "llm.TransferBackend"
	keySyncTimeout    = "llm.SyncKvCacheWaitTime"
	keyListenIP       = "llm.ListenIp"
	keyListenPort     = "llm.ListenPort"
	keyLocalCommRes   = "llm.LocalCommRes"
	keyDevicePool     = "llm.MemPoolConfig"
	keyHostPool       = "llm.HostMemPoolConfig"
	keyTrafficClass   = "llm.RdmaTrafficClass"
	keyServiceLevel   = "llm.RdmaServiceLevel"
	keyLinkTotalTime  = "llm.LinkTotalTime"
	keyLinkRetryCount = "llm.LinkRetryCount"
	keyDeviceID       = "ge.exec.deviceId"
)

// Defaults, with the reason for each number.
const (
	defaultSyncTimeout    = 1000 * time.Millisecond // documented (spec §10)
	defaultLinkTotal      = 120 * time.Second       // documented (spec §7.4)
	defaultTCPConnections = 2                       // two streams reach the limit of loopback with two cores; a third adds nothing there
	defaultPeerDeadMillis = 5000                    // a peer silent for so long is worth less than the requests that wait for it
	mostCopyThreads       = 64
	defaultCopyThreads    = 4 // beyond four, copies wait for memory, not for cores
	mostTCPConnections    = 16
	leastPeerDeadMillis   = 100       // a quarter of it is the time between pings
	mostSpinMicros        = 1_000_000 // a core that spins for longer waits for nothing that is near
)

// ParseOptions reads the options that the native layer checks (spec §7.1) and ours (docs/options.md), an option before the environment
// before the default. getenv is os.LookupEnv but in tests.
// It returns ParamInvalid for a bad value, FeatureNotEnabled for a part that is not built yet.
func ParseOptions(options map[string]string, getenv func(string) (string, bool)) (Options, error) {
	o := Options{CacheManager: options[keyCacheManager] == "1"}
	r := optionReader{options: options, getenv: getenv}
	r.documented(&o)
	r.ours(&o)
	return o, r.err
}

// optionReader reads one option after the other and keeps the first error.
type optionReader struct {
	options map[string]string
	getenv  func(string) (string, bool)
	err     error
}

func (r *optionReader) fail(code status.Code, format string, args ...any) {
	if r.err == nil {
		r.err = status.Newf(code, status.StageCheck, format, args...)
	}
}

func (r *optionReader) documented(o *Options) {
	if value, ok := r.options[keyOneSided]; ok && o.CacheManager {
		if value != "0" && value != "1" {
			r.fail(status.ParamInvalid, "%s is %q, not \"0\" or \"1\"", keyOneSided, value)
		}
		o.OneSided = value == "1"
	}
	if value, ok := r.options[keyBackend]; ok {
		if value != "hixl" {
			r.fail(status.ParamInvalid, "%s is %q, not \"hixl\"", keyBackend, value)
		}
		o.Directional = true
	}
	if value, ok := r.options[keyLocalCommRes]; ok {
		o.LocalCommRes = &value
	}
	o.DeviceID, o.SeveralDevices = firstDevice(r.options[keyDeviceID])
	if o.CacheManager {
		r.integer(keyDeviceID, 0, 1<<31-1)
		for _, key := range []string{keyTrafficClass, keyServiceLevel} {
			if _, ok := r.integer(key, 0, 1<<32-1); ok {
				o.passOn(key, r.options[key])
			}
		}
	}
	o.LinkTotal, o.LinkTries = defaultLinkTotal, 1
	if o.CacheManager {
		if seconds, ok := r.integer(keyLinkTotalTime, 0, 1<<32-1); ok && seconds > 0 {
			o.LinkTotal = time.Duration(seconds) * time.Second
		}
		if tries, ok := r.integer(keyLinkRetryCount, 1, 100); ok {
			o.LinkTries = int(tries)
		}
	}
	o.SyncTimeout = defaultSyncTimeout
	if millis, ok := r.integer(keySyncTimeout, 1, 1<<31-1); ok {
		o.SyncTimeout = time.Duration(millis) * time.Millisecond
	}
	o.DevicePool, o.HostPool = r.pool(keyDevicePool), r.pool(keyHostPool)
	ip, hasIP := r.options[keyListenIP]
	port, hasPort := r.options[keyListenPort]
	o.ListenIP, o.ListenPort, o.HasListen = ip, port, hasIP && hasPort
}

func (o *Options) passOn(key, value string) {
	if o.LibraryOptions == nil {
		o.LibraryOptions = map[string]string{}
	}
	o.LibraryOptions[key] = value
}

// firstDevice reads the first of the ids of devices, of which v1 mode has several; 0 where there is none. What is no number Python has
// refused, or the caller does.
func firstDevice(ids string) (id int32, several bool) {
	first, _, several := strings.Cut(ids, ";")
	number, err := strconv.ParseUint(strings.TrimSpace(first), 10, 31)
	if err != nil {
		return 0, several
	}
	return int32(number), several
}

// integer reads a decimal option and reports whether it is there.
func (r *optionReader) integer(key string, least, most int64) (int64, bool) {
	text, ok := r.options[key]
	if !ok {
		return 0, false
	}
	value, err := digits(text)
	if err != nil || value < least || value > most {
		r.fail(status.ParamInvalid, "%s is %q, not an integer from %d to %d", key, text, least, most)
		return 0, false
	}
	return value, true
}

// digits reads a number that has no sign.
func digits(text string) (int64, error) {
	value, err := strconv.ParseUint(text, 10, 63)
	return int64(value), err
}

func (r *optionReader) pool(key string) *cache.PoolConfig {
	text := r.options[key]
	if text == "" {
		return nil
	}
	config, err := cache.ParsePoolConfig(text)
	if err != nil {
		if r.err == nil {
			r.err = err
		}
		return nil
	}
	return &config
}

// ourOption is a row of the table of docs/options.md: where the value comes from and what is built.
type ourOption struct {
	key, env string
	values   []string // that are known; nil: any
	built    []string // of these; nil: all of them, none: empty and not nil
}

// The options whose values are words. A value that is known but not built yet is FeatureNotEnabled.
var ourWords = []ourOption{
	{"open.Device", "LLM_DATADIST_DEVICE", []string{"auto", "host", nameCANN}, nil},
	{"open.Transport", "LLM_DATADIST_TRANSPORT", []string{"auto", nameSHM, nameTCP, "ucx", nameCANN}, []string{"auto", nameSHM, nameTCP, nameCANN}},
	{"open.CannPath", "LLM_DATADIST_CANN_PATH", nil, nil},
	{"open.Fabric", "LLM_DATADIST_FABRIC", []string{nameLoopback}, nil},
	{"open.MultipleEngines", "", []string{"0", "1"}, nil},
	{"open.Relink", "", []string{"0", "1"}, []string{"0"}},
	{"open.Integrity", "LLM_DATADIST_INTEGRITY", []string{"off", "sampled", "always"}, []string{"off"}},
	{"open.AuthSecretFile", "LLM_DATADIST_AUTH_SECRET_FILE", nil, []string{}},
	{"open.TlsCertFile", "LLM_DATADIST_TLS_CERT_FILE", nil, []string{}},
	{"open.TlsKeyFile", "LLM_DATADIST_TLS_KEY_FILE", nil, []string{}},
	{"open.TlsCaFile", "LLM_DATADIST_TLS_CA_FILE", nil, []string{}},
	{"open.MetricsAddress", "LLM_DATADIST_METRICS_ADDRESS", nil, []string{}},
}

// The options whose values are numbers.
const (
	keyCopyThreads    = "open.CopyThreads"
	keyTCPConnections = "open.TcpConnections"
	keyPeerDeadMillis = "open.PeerDeadMillis"
	keySpinMicros     = "open.SpinMicros"
	keyRendezvousPort = "open.RendezvousPort"
)

func (r *optionReader) ours(o *Options) {
	known := map[string]bool{keyCopyThreads: true, keyTCPConnections: true, keyPeerDeadMillis: true, keySpinMicros: true,
		keyRendezvousPort: true}
	words := map[string]string{}
	for _, option := range ourWords {
		known[option.key] = true
		words[option.key] = r.word(option)
	}
	for key := range r.options {
		if strings.HasPrefix(key, "open.") && !known[key] {
			r.fail(status.ParamInvalid, "there is no option %q", key)
		}
	}
	o.Device, o.Transport, o.LibraryPath = words["open.Device"], words["open.Transport"], words["open.CannPath"]
	o.Loopback, o.MultipleEngines = words["open.Fabric"] == nameLoopback, words["open.MultipleEngines"] == "1"
	o.CopyThreads = int(r.number(keyCopyThreads, "LLM_DATADIST_COPY_THREADS", int64(min(defaultCopyThreads, runtime.NumCPU())), 1, mostCopyThreads))
	o.TCPConnections = int(r.number(keyTCPConnections, "LLM_DATADIST_TCP_CONNECTIONS", defaultTCPConnections, 1, mostTCPConnections))
	o.PeerDead = time.Duration(r.number(keyPeerDeadMillis, "LLM_DATADIST_PEER_DEAD_MILLIS", defaultPeerDeadMillis, leastPeerDeadMillis, 1<<31-1)) * time.Millisecond
	o.RendezvousPort = uint16(r.number(keyRendezvousPort, "LLM_DATADIST_RENDEZVOUS_PORT", 0, 1, 1<<16-1))
	o.Spin = time.Duration(r.number(keySpinMicros, "LLM_DATADIST_SPIN_MICROS", 0, 0, mostSpinMicros)) * time.Microsecond
}

// word reads an option of the table; "" where it is set nowhere.
func (r *optionReader) word(option ourOption) string {
	value, origin, ok := r.lookup(option.key, option.env)
	if !ok {
		return ""
	}
	if option.values != nil && !contains(option.values, value) {
		r.fail(status.ParamInvalid, "%s is %q, not one of %s", origin, value, strings.Join(option.values, ", "))
		return ""
	}
	if option.built != nil && !contains(option.built, value) {
		r.fail(status.FeatureNotEnabled, "%s is %q, which this version does not have yet", origin, value)
		return ""
	}
	return value
}

func (r *optionReader) number(key, env string, fallback, least, most int64) int64 {
	text, origin, ok := r.lookup(key, env)
	if !ok {
		return fallback
	}
	value, err := digits(text)
	if err != nil || value < least || value > most {
		r.fail(status.ParamInvalid, "%s is %q, not an integer from %d to %d", origin, text, least, most)
		return fallback
	}
	return value
}

// lookup returns a value and the name of the place that it comes from.
func (r *optionReader) lookup(key, env string) (value, origin string, ok bool) {
	if value, ok = r.options[key]; ok {
		return value, "the option " + key, true
	}
	if env == "" {
		return "", "", false
	}
	value, ok = r.getenv(env)
	return value, "the environment variable " + env, ok
}

func contains(list []string, value string) bool {
	for _, known := range list {
		if known == value {
			return true
		}
	}
	return false
}
