// SPDX-License-Identifier: Apache-2.0

// Command links measures what links cost: how long it takes to make many of them, the resident memory of an idle one, and the
// processor time that they use while nothing moves. benchmarks/run.py calls it and prints its figures.
//
// One engine links to many light ones (no pools), which live in a second process of the same program. With -fabric all engines live in
// this process, on the in-memory network. It prints one JSON object.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/engine"
	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

const (
	linkWithin = time.Minute     // for all links of a run; who needs longer has failed
	settle     = time.Second     // until what making links has started is over: parked connections, ended goroutines
	watched    = 2 * time.Second // how long idle links are looked at
	centre     = 1               // cluster id of the engine that links; the others have the ids after it
)

// result is what is printed.
type result struct {
	Transport   string  `json:"transport"`
	Links       int     `json:"links"`
	Refused     string  `json:"refused,omitempty"` // why this build can't: nothing else is set then
	Seconds     float64 `json:"seconds"`           // until all were made
	RSSBefore   uint64  `json:"rss_before"`        // of the engine's process, in bytes
	RSSAfter    uint64  `json:"rss_after"`
	PerLink     float64 `json:"rss_per_link"`
	IdleSeconds float64 `json:"idle_seconds"`
	IdleCPU     float64 `json:"idle_cpu_seconds"` // of both processes, within IdleSeconds
	Explain     string  `json:"explain"`          // of the last link
}

func main() {
	transport := flag.String("transport", "tcp", "what open.Transport requires")
	links := flag.Int("links", 64, "how many")
	onFabric := flag.Bool("fabric", false, "all engines in this process, on the in-memory network; -transport is not used")
	serve := flag.Int("serve", 0, "be the second process, with so many engines")
	flag.Parse()
	if err := run(*transport, *links, *onFabric, *serve); err != nil {
		fmt.Fprintln(os.Stderr, "links:", err)
		os.Exit(1)
	}
}

func run(transport string, links int, onFabric bool, serve int) error {
	if serve > 0 {
		return serveEngines(transport, serve)
	}
	r := result{Transport: transport, Links: links}
	var err error
	if onFabric {
		r.Transport = "fabric"
		err = measureFabric(&r)
	} else {
		err = measureProcesses(&r)
	}
	if status.CodeOf(err) == status.FeatureNotEnabled {
		r, err = result{Transport: r.Transport, Links: r.Links, Refused: err.Error()}, nil
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// light makes an engine without pools that listens on ip.
func light(id uint64, transport, ip string, network link.Network) (*engine.Engine, error) {
	options, err := engine.ParseOptions(map[string]string{
		"llm.EnableCacheManager": "1", "llm.ListenIp": ip, "llm.ListenPort": "0", "open.Transport": transport,
	}, func(string) (string, bool) { return "", false })
	if err != nil {
		return nil, err
	}
	return engine.New(id, options, engine.Parts{Device: mem.Host(), Network: network})
}

// cluster says how to link to the engine that has id and listens on address.
func cluster(id uint64, address string) engine.Cluster {
	return engine.Cluster{ID: &id, Local: []string{"127.0.0.1"}, Remote: []string{address}}
}

// measureProcesses links one engine of this process to those of a second one.
func measureProcesses(r *result) error {
	e, err := light(centre, r.Transport, "127.0.0.1", engine.TCP())
	if err != nil {
		return err
	}
	peers, err := startPeers(r.Transport, r.Links+1)
	if err != nil {
		return errors.Join(err, e.Close())
	}
	var clusters []engine.Cluster
	for i, address := range peers.addresses {
		clusters = append(clusters, cluster(centre+1+uint64(i), address))
	}
	err = measure(r, e, clusters, peers.cpu)
	return errors.Join(err, e.Close(), peers.stop())
}

// measureFabric links one engine to others in this process. A link's memory is that of both ends and of the network between them.
func measureFabric(r *result) error {
	network := fabric.New(1)
	defer network.Close()
	var engines []*engine.Engine
	var clusters []engine.Cluster
	closeAll := func() (err error) {
		for _, e := range engines {
			err = errors.Join(err, e.Close())
		}
		return err
	}
	for i := range r.Links + 2 {
		host := network.Host(strconv.Itoa(i))
		e, err := light(centre+uint64(i), "tcp", host.IP(), hostNetwork{host})
		if err != nil {
			return errors.Join(err, closeAll())
		}
		engines = append(engines, e)
		if i > 0 {
			clusters = append(clusters, cluster(centre+uint64(i), e.ListenAddress()))
		}
	}
	err := measure(r, engines[0], clusters, func() (float64, error) { return 0, nil })
	return errors.Join(err, closeAll())
}

// hostNetwork is a host of the fabric as a link.Network, without a proof of a shared host.
type hostNetwork struct{ *fabric.Host }

func (hostNetwork) Prover() link.Prover { return nil }

// measure links e to the clusters and fills in r. The first link is made before and not counted: it pays for what the process touches
// once.
func measure(r *result, e *engine.Engine, clusters []engine.Cluster, peersCPU func() (float64, error)) error {
	if err := linkAll(e, clusters[:1]); err != nil {
		return err
	}
	var err error
	if r.RSSBefore, err = resident(); err != nil {
		return err
	}
	start := time.Now()
	if err := linkAll(e, clusters[1:]); err != nil {
		return err
	}
	r.Seconds = time.Since(start).Seconds()
	if r.RSSAfter, err = resident(); err != nil {
		return err
	}
	r.PerLink = (float64(r.RSSAfter) - float64(r.RSSBefore)) / float64(r.Links)
	if err := watch(r, peersCPU); err != nil {
		return err
	}
	r.Explain = e.Explain(*clusters[len(clusters)-1].ID)
	return nil
}

func linkAll(e *engine.Engine, clusters []engine.Cluster) error {
	ctx, cancel := context.WithTimeout(context.Background(), linkWithin)
	defer cancel()
	return errors.Join(e.LinkClusters(ctx, clusters)...)
}

// resident waits until making links is over, gives back what the runtime keeps without need, and returns VmRSS in bytes.
func resident() (uint64, error) {
	<-time.After(settle)
	runtime.GC()
	debug.FreeOSMemory()
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		var kib uint64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/self/status has no VmRSS")
}

// watch measures the processor time that idle links use.
func watch(r *result, peersCPU func() (float64, error)) error {
	total := func() (float64, error) {
		own, err := cpu()
		theirs, err2 := peersCPU()
		return own + theirs, errors.Join(err, err2)
	}
	<-time.After(settle)
	before, err := total()
	if err != nil {
		return err
	}
	start := time.Now()
	<-time.After(watched)
	after, err := total()
	r.IdleSeconds, r.IdleCPU = time.Since(start).Seconds(), after-before
	return err
}

// cpu returns the processor time that this process has used, in seconds.
func cpu() (float64, error) {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		return 0, err
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()).Seconds(), nil
}

// peers is the second process.
type peers struct {
	command   *exec.Cmd
	in        *json.Encoder
	out       *bufio.Scanner
	end       func() error
	addresses []string
}

func startPeers(transport string, count int) (*peers, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	command := exec.Command(self, "-transport", transport, "-serve", strconv.Itoa(count))
	command.Stderr = os.Stderr
	in, err := command.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := command.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := command.Start(); err != nil {
		return nil, err
	}
	p := &peers{command: command, in: json.NewEncoder(in), out: bufio.NewScanner(out), end: in.Close}
	p.out.Buffer(nil, 1<<20) // a line names every address
	if err := p.read(&p.addresses); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

func (p *peers) read(into any) error {
	if !p.out.Scan() {
		return errors.Join(errors.New("the second process has ended"), p.out.Err())
	}
	return json.Unmarshal(p.out.Bytes(), into)
}

// cpu asks the second process for its processor time.
func (p *peers) cpu() (float64, error) {
	var seconds float64
	err := p.in.Encode("cpu")
	if err == nil {
		err = p.read(&seconds)
	}
	return seconds, err
}

func (p *peers) stop() error { return errors.Join(p.end(), p.command.Wait()) }

// serveEngines is the second process: it prints the addresses of its engines, then its processor time for each line that it reads.
func serveEngines(transport string, count int) (err error) {
	var engines []*engine.Engine
	defer func() {
		for _, e := range engines {
			err = errors.Join(err, e.Close())
		}
	}()
	var addresses []string
	for i := range count {
		e, err := light(centre+1+uint64(i), transport, "127.0.0.1", engine.TCP())
		if err != nil {
			return err
		}
		engines = append(engines, e)
		addresses = append(addresses, e.ListenAddress())
	}
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(addresses); err != nil {
		return err
	}
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		seconds, err := cpu()
		if err == nil {
			err = out.Encode(seconds)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
