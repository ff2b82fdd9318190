// Go's HTTP server and its client with kept connections: http ADDRESS COUNT. Bodies of many
// sizes go both ways, some from a file; prints how many came back the same.
package main

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"math/rand"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
)

func main() {
	address := os.Args[1]
	count, err := strconv.Atoi(os.Args[2])
	check(err)
	listener, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	check(err)
	// net/http hands a file to the socket by sendfile.
	file, err := os.CreateTemp("", "underpass-go")
	check(err)
	defer os.Remove(file.Name())
	content := make([]byte, 200_000)
	rand.Read(content)
	_, err = file.Write(content)
	check(err)
	http.HandleFunc("/back", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		check(err)
		w.Write(body)
	})
	http.HandleFunc("/file", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, file.Name())
	})
	go http.Serve(listener, nil)

	good := make(chan bool, count)
	var clients sync.WaitGroup
	for client := 0; client < 4; client++ {
		clients.Add(1)
		go func(client int) {
			defer clients.Done()
			transport := &http.Transport{MaxConnsPerHost: 1}
			chance := rand.New(rand.NewSource(int64(client)))
			for number := client; number < count; number += 4 {
				body := make([]byte, int(math.Pow(500_000, chance.Float64())))
				chance.Read(body)
				path, expected := "/back", body
				if number%7 == 0 {
					path, expected = "/file", content
				}
				request, err := http.NewRequest("POST", "http://"+listener.Addr().String()+path, bytes.NewReader(body))
				check(err)
				response, err := transport.RoundTrip(request)
				check(err)
				got, err := io.ReadAll(response.Body)
				check(err)
				response.Body.Close()
				if bytes.Equal(got, expected) {
					good <- true
				}
			}
		}(client)
	}
	clients.Wait()
	fmt.Println(len(good))
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
