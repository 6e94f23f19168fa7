// The model endpoint of the benchmarks: compiled, so that it is not what is measured.
//
// It answers every chat completion after a latency drawn from a lognormal distribution (sigma 0: a
// constant, median 0: at once) with valid records, which say when their call began and ended, and
// integrates how many calls were in flight. It prints its port.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// gauge counts calls and the time that they were in flight, summed over them.
type gauge struct {
	mu       sync.Mutex
	ended    int
	inFlight int
	most     int
	busyS    float64
	since    time.Time
}

func (g *gauge) move(by int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settle()
	g.inFlight += by
	g.most = max(g.most, g.inFlight)
	if by < 0 {
		g.ended++
	}
}

func (g *gauge) settle() {
	now := time.Now()
	g.busyS += float64(g.inFlight) * now.Sub(g.since).Seconds()
	g.since = now
}

func (g *gauge) report(w http.ResponseWriter, _ *http.Request) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.settle()
	figures := map[string]any{"calls": g.ended, "busy_s": g.busyS, "most": g.most}
	json.NewEncoder(w).Encode(figures)
}

func record(began, ended time.Time) string {
	return fmt.Sprintf(
		`{"name":"Ada Lovelace","age":36,"began_us":%d,"ended_us":%d}`,
		began.UnixMicro(), ended.UnixMicro(),
	)
}

func answer(records int, began, ended time.Time) string {
	one := record(began, ended)
	if records == 0 {
		return one
	}
	return `{"records":[` + strings.TrimSuffix(strings.Repeat(one+",", records), ",") + `]}`
}

func main() {
	median := flag.Float64("median-ms", 0, "median latency")
	sigma := flag.Float64("sigma", 0, "of the lognormal distribution")
	records := flag.Int("records", 0, "records in an answer; 0: one, not in a list")
	flag.Parse()

	calls := &gauge{since: time.Now()}
	http.HandleFunc("/_stats", calls.report)
	http.HandleFunc("/v1/models", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, `{"object":"list","data":[{"id":"bench","object":"model"}]}`)
	})
	http.HandleFunc("/v1/chat/completions", func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		calls.move(1)
		defer calls.move(-1)
		io.Copy(io.Discard, r.Body)
		if *median > 0 {
			seconds := *median / 1000 * math.Exp(*sigma*rand.NormFloat64())
			time.Sleep(time.Duration(seconds * float64(time.Second)))
		}
		content, _ := json.Marshal(answer(*records, began, time.Now()))
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"bench",`+
			`"choices":[{"index":0,"message":{"role":"assistant","content":%s},`+
			`"finish_reason":"stop"}],`+
			`"usage":{"prompt_tokens":80,"completion_tokens":20,"total_tokens":100}}`, content)
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	panic(http.Serve(listener, nil))
}
